"""Names of curves, grouped as TensorBoard and the trackers show them."""

TRAIN = {"loss", "grad_norm", "skipped", "skipped_in_a_row"}
TIME = {"ms_per_step", "tokens_per_s"}


def tag(name: str) -> str:
    """The group and name of a metric; what is not known is the optimizer's own.

    >>> [tag(x) for x in ("loss", "eval_loss", "ms_per_step", "overlap/q")]
    ['train/loss', 'eval/loss', 'time/ms_per_step', 'optimizer/overlap/q']
    """
    if name.startswith("eval_"):
        return f"eval/{name.removeprefix('eval_')}"
    group = "train" if name in TRAIN else "time" if name in TIME else "optimizer"
    return f"{group}/{name}"
