"""Work belongs to ranges by its launch, and summaries count it exactly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cs336_systems.bench.records import Store
from cs336_systems.errors import UserError
from cs336_systems.profiling.categories import CATEGORIES, PATTERNS, category_of
from cs336_systems.profiling.kernels import (
    RANGE_COLUMNS,
    WORK_COLUMNS,
    Recording,
    during,
    membership,
    occurrences,
    outside,
    overview,
    summarise,
)

MAIN, AUTOGRAD, LOADER, OTHER_PROCESS = 10, 11, 12, 20


def opened(name: str, start: int, end: int, thread: int = MAIN, process: int = MAIN, wide: bool = False) -> tuple:
    return (name, start, end, process, thread, wide)


def ran(
    name: str, launched: int | None, start: int, end: int, thread: int = MAIN, process: int = MAIN
) -> tuple[Any, ...]:
    is_linked = launched is not None
    return (name, start, end, end - start, process, thread, launched if is_linked else -1, is_linked)


def recording(ranges: list[tuple], work: list[tuple]) -> Recording:
    rows = pd.DataFrame(work, columns=list(WORK_COLUMNS))
    return Recording(
        work=rows.assign(name=pd.Categorical(rows["name"])),
        ranges=pd.DataFrame(ranges, columns=list(RANGE_COLUMNS)),
        unit="kernel",
    )


def members(made: Recording) -> dict[str, list[str]]:
    """The kernels of each range, all the times that it was open together, by their starts."""
    names = made.work["name"].astype(object)
    found: dict[str, list[str]] = {name: [] for name in made.range_keys["range"]}
    for key, work in made.in_all.itertuples(index=False):
        found[made.range_keys["range"][key]].append(names[work])
    return found


# Whose a kernel is ---------------------------------------------------------------------------------------------


def test_a_kernel_belongs_to_every_range_that_was_open_when_it_was_launched() -> None:
    ranges = [opened("step", 0, 100), opened("forward", 0, 50), opened("scores", 10, 20), opened("backward", 50, 100)]
    work = [ran("a", 5, 6, 7), ran("b", 15, 16, 17), ran("c", 60, 61, 62)]
    expected = {"step": ["a", "b", "c"], "forward": ["a", "b"], "scores": ["b"], "backward": ["c"]}
    assert members(recording(ranges, work)) == expected


def test_when_a_kernel_ran_does_not_matter() -> None:
    ranges = [opened("forward", 0, 50), opened("backward", 50, 100)]
    work = [ran("launched early", 49, 700, 900), ran("launched late", 50, 51, 52)]
    assert members(recording(ranges, work)) == {"forward": ["launched early"], "backward": ["launched late"]}


def test_a_range_begins_at_its_first_nanosecond_and_ends_before_its_last() -> None:
    work = [ran("before", 9, 9, 10), ran("first", 10, 11, 12), ran("last", 19, 20, 21), ran("after", 20, 22, 23)]
    assert members(recording([opened("forward", 10, 20)], work)) == {"forward": ["first", "last"]}


def test_what_the_autograd_thread_launches_belongs_to_the_ranges_open_on_the_main_thread() -> None:
    ranges = [opened("step", 0, 100), opened("forward", 0, 50), opened("backward", 50, 100)]
    work = [ran("a", 20, 21, 22), ran("b", 60, 61, 62, AUTOGRAD), ran("c", 200, 201, 202, AUTOGRAD)]
    assert members(recording(ranges, work)) == {"step": ["a", "b"], "forward": ["a"], "backward": ["b"]}


def test_a_range_of_the_autograd_thread_is_inside_the_ranges_of_the_main_thread_that_are_around_it() -> None:
    ranges = [
        opened("backward", 50, 100),
        opened("recomputed", 60, 80, AUTOGRAD),
        opened("scores", 65, 70, AUTOGRAD),
    ]
    work = [ran("a", 66, 70, 71, AUTOGRAD), ran("b", 75, 76, 77, AUTOGRAD), ran("c", 90, 91, 92, AUTOGRAD)]
    expected = {"backward": ["a", "b", "c"], "recomputed": ["a", "b"], "scores": ["a"]}
    assert members(recording(ranges, work)) == expected


def test_a_threads_own_range_wins_over_one_of_the_main_thread_that_is_not_around_it() -> None:
    """A loader's range from before the step until after it is no part of what the main thread does meanwhile."""
    ranges = [opened("forward", 20, 80), opened("loading", 10, 90, LOADER)]
    assert members(recording(ranges, [ran("copy", 50, 51, 52, LOADER)])) == {"loading": ["copy"], "forward": []}


def test_the_main_thread_takes_no_range_of_another_thread() -> None:
    ranges = [opened("forward", 20, 40), opened("loading", 0, 100, LOADER)]
    work = [ran("a", 30, 31, 32), ran("b", 50, 51, 52)]
    assert members(recording(ranges, work)) == {"loading": [], "forward": ["a"]}


def test_where_the_main_thread_has_no_range_another_thread_takes_those_of_the_first_that_opened_one() -> None:
    ranges = [opened("loading", 5, 100, LOADER), opened("step", 0, 100, 13), opened("optimizer", 70, 80, 13)]
    work = [ran("a", 50, 51, 52, AUTOGRAD), ran("b", 75, 76, 77, 13)]
    assert members(recording(ranges, work)) == {"step": ["a", "b"], "loading": [], "optimizer": ["b"]}


def test_a_range_of_the_whole_process_holds_for_all_its_threads_and_need_not_nest() -> None:
    ranges = [opened("forward", 0, 50), opened("request", 40, 60, LOADER, wide=True), opened("inner", 55, 90, AUTOGRAD)]
    work = [ran("a", 45, 46, 47), ran("b", 55, 56, 57, AUTOGRAD), ran("c", 57, 58, 59), ran("d", 70, 71, 72, AUTOGRAD)]
    assert members(recording(ranges, work)) == {"forward": ["a"], "request": ["a", "b", "c"], "inner": ["b", "d"]}


def test_processes_are_kept_apart() -> None:
    ranges = [opened("step", 0, 100), opened("step", 0, 100, OTHER_PROCESS, OTHER_PROCESS)]
    work = [ran("a", 50, 51, 61), ran("b", 50, 51, 81, AUTOGRAD, OTHER_PROCESS), ran("c", 50, 52, 53, 30, 30)]
    rows = summarise(recording(ranges, work))
    assert rows[["range", "process", "name", "total"]].to_numpy().tolist() == [
        ["step", MAIN, "a", 10],
        ["step", OTHER_PROCESS, "b", 30],
    ]


def test_a_kernel_whose_launch_is_not_known_belongs_to_no_range() -> None:
    made = recording([opened("step", -100, 100)], [ran("a", None, 10, 25), ran("b", 5, 30, 37)])
    assert members(made) == {"step": ["b"]}
    assert outside(made) == (1, 15)


def random_ranges(generator: np.random.Generator, thread: int, start: int, end: int, depth: int) -> list[tuple]:
    """Ranges within ranges, side by side, touching and of no length, as pushing and popping makes them."""
    found = []
    cuts = sorted(generator.integers(start, end + 1, size=2 * int(generator.integers(1, 4))).tolist())
    for low, high in zip(cuts[::2], cuts[1::2], strict=True):
        found.append(opened(f"{generator.integers(4)}", low, high, thread))
        if depth and high - low > 1:
            found += random_ranges(generator, thread, low, high, depth - 1)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_membership_equals_the_rule_applied_to_each_launch_alone(seed: int) -> None:
    generator = np.random.default_rng(seed)
    threads = [MAIN, AUTOGRAD, LOADER]
    ranges = [each for thread in threads for each in random_ranges(generator, thread, 0, 300, 3)]
    work = [
        ran("k", int(generator.integers(-10, 320)), 0, 1, int(generator.choice([*threads, 13]))) for _ in range(200)
    ]
    made = recording(ranges, work)
    expected = set()
    for number, (_, _, _, _, _, thread, launched, _) in enumerate(work):
        own = [each for each in ranges if each[4] == thread and each[1] <= launched < each[2]]
        first, last = (
            min((each[1] for each in own), default=launched),
            max((each[2] - 1 for each in own), default=launched),
        )
        for index, (_, start, end, _, of_thread, _) in enumerate(ranges):
            is_own = of_thread == thread and start <= launched < end
            is_around = thread != MAIN and of_thread == MAIN and start <= first and last < end
            if is_own or is_around:
                expected.add((index, number))
    in_range, of_work = membership(made.work, made.ranges)
    assert len(in_range) == len(expected)
    assert set(zip(in_range.tolist(), of_work.tolist(), strict=True)) == expected


# What is counted -----------------------------------------------------------------------------------------------


def test_the_summary_has_nsights_columns_to_the_nanosecond() -> None:
    times = [10, 20, 60, 30]
    work = [ran("gemm", 1, 100 * at, 100 * at + time) for at, time in enumerate(times)]
    rows = summarise(recording([opened("forward", 0, 50)], [*work, ran("vectorized_elementwise_kernel", 2, 800, 840)]))
    gemm, other = rows.itertuples(index=False)
    assert gemm.name == "gemm"
    assert gemm.category == "matrix products"
    assert (gemm.share, gemm.total, gemm.instances) == (120 / 160, 120, 4)
    assert (gemm.average, gemm.median, gemm.minimum, gemm.maximum) == (30.0, 25.0, 10, 60)
    assert gemm.deviation == math.sqrt((400 + 100 + 900 + 0) / 3)
    assert (other.share, other.total, other.instances) == (40 / 160, 40, 1)
    assert math.isnan(other.deviation)


def test_time_of_kernels_that_overlap_is_summed_and_busy() -> None:
    work = [
        ran("a", 1, 100, 200),
        ran("a", 2, 150, 250),  # on another stream
        ran("b", 3, 160, 180),  # inside both
        ran("b", 4, 250, 260),  # at once after
        ran("a", 5, 300, 310),
    ]
    made = recording([opened("forward", 0, 50)], work)
    (row,) = overview(made).itertuples(index=False)
    assert (row.instances, row.total, row.busy) == (5, 240, 170)
    by_name = summarise(made).set_index("name")
    assert by_name[["total", "busy"]].to_dict("index") == {
        "a": {"total": 210, "busy": 160},
        "b": {"total": 30, "busy": 30},
    }


def test_a_range_that_is_opened_again_is_counted_each_time_and_in_all() -> None:
    ranges = [opened("step", 0, 10), opened("step", 20, 35), opened("step", 40, 50)]
    work = [ran("a", 1, 100, 110), ran("a", 22, 110, 130), ran("b", 23, 120, 160)]
    made = recording(ranges, work)
    each = occurrences(made, "step")
    columns = ["number", "start", "open", "instances", "total", "busy"]
    assert each[columns].to_numpy().tolist() == [[1, 0, 10, 1, 10, 10], [2, 20, 15, 2, 60, 50], [3, 40, 10, 0, 0, 0]]
    (row,) = overview(made).itertuples(index=False)
    assert (row.occurrences, row.open, row.instances, row.total, row.busy) == (3, 35, 3, 70, 60)
    assert summarise(made)[["name", "total", "instances"]].to_numpy().tolist() == [["b", 40, 1], ["a", 30, 2]]
    second = summarise(made, range_name="step", occurrence=2)
    assert second[["name", "total", "instances"]].to_numpy().tolist() == [["b", 40, 1], ["a", 20, 1]]


def test_occurrences_are_numbered_by_their_start_in_each_process() -> None:
    ranges = [opened("step", 50, 60), opened("step", 0, 10), opened("step", 20, 30, OTHER_PROCESS, OTHER_PROCESS)]
    each = occurrences(recording(ranges, [ran("a", 1, 2, 3)]), "step")
    assert each[["process", "number", "start"]].to_numpy().tolist() == [
        [MAIN, 1, 0],
        [MAIN, 2, 50],
        [OTHER_PROCESS, 1, 20],
    ]


def test_a_range_inside_one_of_its_own_name_counts_its_kernels_once() -> None:
    made = recording([opened("block", 0, 50), opened("block", 10, 20)], [ran("a", 15, 16, 26), ran("a", 30, 31, 36)])
    assert summarise(made)[["total", "instances"]].to_numpy().tolist() == [[15, 2]]
    assert occurrences(made, "block")["total"].tolist() == [15, 10]


def test_kernels_are_grouped_by_their_category() -> None:
    work = [
        ran("ampere_sgemm_128x64_tn", 1, 0, 70),
        ran("void cutlass::Kernel2<cutlass_80_simt_sgemm>(T1::Params)", 1, 70, 90),
        ran("softmax_warp_forward", 1, 90, 100),
    ]
    rows = summarise(recording([opened("forward", 0, 9)], work), group="category")
    assert rows[["name", "total", "instances", "minimum"]].to_numpy().tolist() == [
        ["matrix products", 90, 2, 20],
        ["softmax and other reductions", 10, 1, 10],
    ]


def test_an_unknown_range_is_an_error_that_lists_those_there_are() -> None:
    made = recording([opened("forward", 0, 10), opened("backward", 10, 20)], [ran("a", 1, 2, 3)])
    with pytest.raises(UserError, match=r"unknown range 'foward': did you mean 'forward'\? Known: forward, backward"):
        summarise(made, range_name="foward")
    with pytest.raises(UserError, match="unknown range"):
        occurrences(made, "foward")


@pytest.mark.parametrize("number", [0, 3, -1])
def test_an_occurrence_that_there_was_not_is_an_error_that_says_how_many_there_were(number: int) -> None:
    made = recording([opened("step", 0, 10), opened("step", 10, 20)], [ran("a", 1, 2, 3)])
    with pytest.raises(UserError, match=f"'step' was open 2 times: expected a number from 1, found {number}"):
        summarise(made, range_name="step", occurrence=number)


def test_ranges_without_any_kernel_have_no_rows() -> None:
    made = recording([opened("zero_grad", 0, 10), opened("zero_grad", 20, 30)], [ran("a", 15, 16, 17)])
    assert summarise(made).empty
    assert overview(made)[["occurrences", "instances", "total", "busy"]].to_numpy().tolist() == [[2, 0, 0, 0]]


# What kind of work ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("category", "names"),
    [
        (
            "matrix products",
            [
                "ampere_sgemm_32x128_tn",
                "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NTN",
                "sm90_xmma_gemm_f32f32_tf32f32_f32_nn_n_tilesize128x128x32_warpgroupsize1x1x1_execute_segment_k_off",
                "void cublasLt::splitKreduce_kernel<32, 16, int, float, float>(cublasLt::cublasSplitKParams<float>)",
                "triton_tem_fused_addmm_3",
                "aten::addmm",
                "aten::bmm",
            ],
        ),
        (
            "softmax and other reductions",
            [
                "void (anonymous namespace)::softmax_warp_forward<float, float, float, 8, false, false>(float*)",
                "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float>>>(R)",
                "triton_per_fused__softmax_add_5",
                "triton_red_fused_mean_mul_pow_0",
                "aten::_log_softmax",
                "aten::sum",
            ],
        ),
        (
            "elementwise",
            [
                "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>(int)",
                "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<4>>(T)",
                "triton_poi_fused_mul_silu_2",
                "aten::mul_",
                "aten::gelu_backward",
                "aten::_foreach_add_",
            ],
        ),
        (
            "copies",
            [
                "[CUDA memcpy Host-to-Device]",
                "[CUDA memset]",
                "Memcpy DtoH (Device -> Pinned)",
                "Memset (Device)",
                "void at::native::elementwise_kernel<128, 2, at::native::direct_copy_kernel_cuda(at::Iterator&)>(int)",
                "aten::copy_",
                "aten::cat",
            ],
        ),
        (
            "attention kernels",
            [
                "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, false>>(P)",
                "fmha_cutlassF_f32_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<float>::Params)",
                "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_31_64x128x64",
                "triton_tem_fused_flex_attention_0",
                "forward_kernel",
                "grad_key_value_kernel",
                "aten::_scaled_dot_product_flash_attention_for_cpu",
            ],
        ),
        (
            "communication",
            ["ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "c10d::allreduce_"],
        ),
        ("other", ["my_kernel", "aten::view", "aten::empty_strided", "forward_kernel_of_mine", "aten::embedding"]),
    ],
)
def test_names_tell_what_kind_of_work_it_is(category: str, names: list[str]) -> None:
    assert {name: category_of(name) for name in names} == dict.fromkeys(names, category)


def test_every_kernel_of_the_published_table_has_a_category(store: Store) -> None:
    published = store.reference("nsys_gpt2xl_ctx256_a100")
    found = published.assign(category=published["kernel"].map(category_of))
    assert set(found["category"]) == {"matrix products", "elementwise", "copies"}
    forward = found[found["range"] == "forward"].groupby("category")["time_percent"].sum()
    assert forward["matrix products"] == pytest.approx(84.8)


def test_every_pattern_is_of_a_category() -> None:
    assert {category for category, _ in PATTERNS} == {*CATEGORIES} - {"other"}


# A part of a recording -----------------------------------------------------------------------------------------


def test_during_a_range_are_what_was_launched_and_opened_in_it_wherever_it_ran() -> None:
    whole = recording(
        [
            opened("warm-up", 0, 10),
            opened("step", 1, 9),
            opened("measured", 20, 40),
            opened("step", 21, 29),
            opened("step", 30, 39),
            opened("across", 35, 50),
        ],
        [
            ran("early", 5, 6, 30),
            ran("within", 25, 60, 70),
            ran("late", 45, 46, 47),
            ran("autograd", 33, 34, 35, AUTOGRAD),
        ],
    )
    part = during(whole, "measured")
    assert part.ranges["name"].tolist() == ["measured", "step", "step"]
    assert part.work["name"].tolist() == ["within", "autograd"]
    assert members(part)["step"] == ["autograd", "within"]
    assert overview(part).set_index("range").loc["step", "occurrences"] == 2


def test_during_a_range_that_does_not_occur_is_an_error_that_lists_those_that_do() -> None:
    with pytest.raises(UserError, match="measured"):
        during(recording([opened("measured", 0, 1)], []), "mesured")
