"""One step of a Transformer: what it is made of, and the step itself, ready to be run again and again.

- inference: the model alone, without autograd.
- forward: the model alone, with autograd on, as in training.
- forward-backward: gradients cleared, forward, cross-entropy, backward.
- step: the same, then AdamW.

Whoever times, profiles, records or predicts a step does so of the same one.

Source: CS336 assignment 2, section 1.1.3.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch

from cs336_systems.attention.backends import attention_source
from cs336_systems.checkpointing import is_nested, parse_policy, plan_of
from cs336_systems.compilation import MODES as COMPILE_MODES
from cs336_systems.compilation import compile_model
from cs336_systems.errors import UserError, unknown_name
from cs336_systems.loss import FORMULATIONS as LOSSES
from cs336_systems.model import SIZES, TransformerConfig, build_model, check_choices
from cs336_systems.optimizer import build_optimizer
from cs336_systems.profiling.ranges import named_range

Phase = Literal["inference", "forward", "forward-backward", "step"]
PHASES: tuple[Phase, ...] = get_args(Phase)
PHASES_OF_TRAINING: tuple[Phase, ...] = PHASES[1:]
DTYPES = ("float32", "bfloat16", "float16")
AUTOCAST = ("none", "bfloat16", "float16")
FLOAT32_MATMUL = ("highest", "high")


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What a step is made of. All of it is checked on creation.

    Raises:
        UserError: a value that cannot be; the message names it and lists what can.
    """

    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    context_length: int
    device: str
    vocab_size: int = 10_000
    rope_theta: float = 10_000.0
    batch_size: int = 4
    phase: str = "step"
    dtype: str = "float32"
    autocast: str = "none"
    float32_matmul: str = "highest"
    """PyTorch's float32_matmul_precision: "high" lets float32 products run in TF32."""
    compile: str = "none"
    """What torch.compile is given: none, the model, or its blocks one by one."""
    attention: str = "reference"
    formulation: str = "reference"
    optimizer: str = "reference"
    rope: str = "2025"
    checkpointing: str = "none"
    """What of the blocks is computed again in backward: a policy of `checkpointing.py`."""
    model: str | None = None
    """Somebody else's model as `module:Class`; None for ours."""

    def __post_init__(self) -> None:
        _ = self.config  # validates the sizes
        check_choices(self.rope, self.formulation)
        for name, known in (
            ("phase", PHASES),
            ("dtype", DTYPES),
            ("autocast", AUTOCAST),
            ("float32_matmul", FLOAT32_MATMUL),
            ("compile", COMPILE_MODES),
            ("device", ("cpu", "cuda")),
        ):
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)
        self.require_whole("batch_size", 1)
        policy = parse_policy(self.checkpointing, self.num_layers)
        if self.compile == "model" and is_nested(plan_of(policy, self.num_layers)):
            raise UserError(
                f"checkpointing {policy} does not go with compile model: within one compiled graph a checkpoint inside "
                "another is none. Compile the blocks, or choose every-K"
            )
        if self.model is not None and self.checkpointing != "none" and self.compile == "blocks":
            raise UserError(
                f"compile blocks and checkpointing {self.checkpointing} do not go together for {self.model}, whose own "
                "loop calls the blocks: compile the model"
            )

    def require_whole(self, name: str, least: int) -> None:
        """Raise a UserError unless a field is a whole number of at least `least`."""
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{name} must be a whole number of at least {least}, found {value!r}")

    @property
    def config(self) -> TransformerConfig:
        return TransformerConfig(
            self.d_model,
            self.d_ff,
            self.num_layers,
            self.num_heads,
            self.vocab_size,
            self.context_length,
            self.rope_theta,
        )

    @property
    def size(self) -> str:
        """The name of the size, whatever its context length, or "custom"."""
        return size_name(self.config)

    @property
    def has_backward(self) -> bool:
        return self.phase in ("forward-backward", "step")

    @property
    def object_references(self) -> tuple[str, ...]:
        """Implementations named by reference, whose source a record depends on beside what every case uses."""
        return tuple(name for name in (self.model, attention_source(self.attention)) if name is not None)

    def as_step(self, **changes: Any) -> StepConfig:
        """The step alone, without what a subclass says beside it, and with some fields changed.

        Raises:
            UserError: a value that cannot be.
        """
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(StepConfig)}
        return StepConfig(**own | changes)

    def __str__(self) -> str:
        return f"{self.size}, context {self.context_length}, {self.phase}"


def size_name(config: TransformerConfig, *, but_for: Sequence[str] = ("context_length",)) -> str:
    """The name under which `SIZES` has this model, whatever the fields of `but_for` are, or "custom"."""
    theirs = {field: getattr(config, field) for field in but_for}
    return next((name for name, size in SIZES.items() if dataclasses.replace(size, **theirs) == config), "custom")


@dataclasses.dataclass(frozen=True)
class BuiltStep:
    """A step that can be run again and again, and what it holds between two runs."""

    run: Callable[[], object]
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    batch: torch.Tensor
    """Tokens and targets, of shape (2, batch, context)."""

    def __call__(self) -> object:
        return self.run()


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Meanwhile what is made without a precision has this one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_step(chosen: StepConfig) -> BuiltStep:
    """Model, random batch and optimizer, and the step that uses them: all is made here, outside the timed region."""
    dtype = getattr(torch, chosen.dtype)
    with torch.device(chosen.device), default_dtype(dtype):
        model = build_model(
            chosen.config,
            model=chosen.model,
            rope=chosen.rope,  # type: ignore[arg-type]
            attention=chosen.attention,
            formulation=chosen.formulation,  # type: ignore[arg-type]
            checkpointing=chosen.checkpointing,
        )
        batch = torch.randint(chosen.vocab_size, (2, chosen.batch_size, chosen.context_length))
    # Ours is made as it should be; on tensors without data a conversion would fail even where it changes nothing.
    if any(each.device.type != chosen.device or each.dtype != dtype for each in model.parameters()):
        model.to(device=chosen.device, dtype=dtype)
    if chosen.model is not None:
        require_logits(chosen, model, batch[0])
    optimizer = build_optimizer(chosen.optimizer, model.parameters())
    if chosen.compile != "none":
        torch.compiler.reset()  # nothing compiled by an earlier case is used
        compile_model(model, chosen.compile)
    return step_of(chosen, model, optimizer, batch)


def step_of(
    chosen: StepConfig, model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor
) -> BuiltStep:
    """The chosen phase of a model that is there already, compiled or not; `run` gives the logits of a forward."""
    tokens, targets = batch
    cross_entropy = LOSSES[chosen.formulation]

    def autocast() -> contextlib.AbstractContextManager[Any]:
        if chosen.autocast == "none":
            return contextlib.nullcontext()
        return torch.autocast(chosen.device, dtype=getattr(torch, chosen.autocast))

    def forward() -> torch.Tensor:
        with autocast(), named_range("forward"):
            logits: torch.Tensor = model(tokens)
            return logits

    def inference() -> torch.Tensor:
        with torch.no_grad():
            return forward()

    def forward_backward() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits = forward()
        with autocast(), named_range("loss"):
            loss = cross_entropy(logits, targets)
        del logits  # the graph keeps what backward needs
        with named_range("backward"):
            loss.backward()

    def step() -> None:
        forward_backward()
        with named_range("optimizer"):
            optimizer.step()

    runs = {"inference": inference, "forward": forward, "forward-backward": forward_backward, "step": step}
    return BuiltStep(runs[chosen.phase], model, optimizer, batch)


def require_logits(chosen: StepConfig, model: torch.nn.Module, tokens: torch.Tensor) -> None:
    """Raise a UserError unless somebody else's model maps tokens to logits."""
    expected = (chosen.batch_size, chosen.context_length, chosen.vocab_size)
    with torch.no_grad():
        found = getattr(model(tokens), "shape", None)
    if found != expected:
        shown = "no tensor" if found is None else f"shape {tuple(found)}"
        raise UserError(f"{chosen.model} must map tokens {expected[:2]} to logits {expected}, found {shown}")
