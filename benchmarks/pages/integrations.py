"""Put what benchmarks/quality/doors.py found into docs/integrations.md, between its markers.

python -m benchmarks.pages.integrations           # rewrite the page
python -m benchmarks.pages.integrations --check   # exit with 1 if it differs
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.pages.markdown import keep_page, table

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "integrations.md"
RESULT = ROOT / "benchmarks" / "results" / "doors.json"


def main() -> None:
    """Rewrite or check."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    rows = [[name, row["compared"], f"{row['same']} of {row['of']}"] for name, row in found["rows"].items()]
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    section = table(["door", "compared", "same first tokens"], rows) + f"\n\n{versions}."
    keep_page(PAGE, {"doors": section}, "integrations", __doc__)


if __name__ == "__main__":
    main()
