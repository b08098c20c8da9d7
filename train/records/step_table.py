"""The table of `train.bench`."""

from collections.abc import Sequence

from train.records.markdown import Row, markdown


def table(rows: Sequence[Row]) -> str:
    """Markdown; memory in GiB on a device, tokens on all of them."""
    columns = {
        "optimizer": "optimizer",
        "layerwise": "layer by layer",
        "step_ms": "step, ms",
        "ratio": "of AdamW's",
        "refresh_ms": "refresh, ms",
        "mean_ratio": "of AdamW's with refreshes",
        "tokens_per_s": "tokens/s",
        "peak_rate": "% of the peak rate",
        "busy_ms": "device busy, ms",
        "compile_s": "compile, s",
        "weights": "weights",
        "state": "state",
        "gradients": "gradients",
        "temporaries": "all of the step alone",
        "peak": "peak, GiB",
        "device_peak": "the device's own",
    }
    return markdown(rows, columns)
