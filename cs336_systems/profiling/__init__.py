"""Named ranges in the code that is measured; it knows nothing of what measures."""
