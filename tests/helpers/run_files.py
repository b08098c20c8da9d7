"""What a run leaves in its folder."""

import json
from pathlib import Path


def strict_lines(path: Path) -> list[dict]:
    """JSON lines as the standard has it, in which there is no NaN."""

    def refuse(constant: str):
        raise ValueError(f"{path} holds {constant}, which is not JSON")

    lines = path.read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]
