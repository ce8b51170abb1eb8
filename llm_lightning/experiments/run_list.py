"""provisional"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def runs(folder: Path) -> list[dict[str, Any]]:
    out = []
    for one in sorted(folder.iterdir()):
        if (one / "job.json").exists():
            s = json.loads((one / "summary.json").read_text()) if (one / "summary.json").exists() else {}
            out.append(
                {"folder": str(one), "status": "finished" if s.get("finished") else "open", "best": s.get("best_value")}
            )
    return out


def table(records: list[dict[str, Any]]) -> list[str]:
    return [f"{Path(r['folder']).name:40} {r['status']} {r['best']}" for r in records]
