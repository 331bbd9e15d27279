"""The directory of a run: its options and metrics."""

# When a run is resumed
MAY_CHANGE = {"out", "resume", "workers", "track", "save_every", "keep", "keep_every"}
MAY_CHANGE |= {"knn_every", "eval_every", "max_bad", "grad_accum_steps", "grad_checkpointing", "compile"}
