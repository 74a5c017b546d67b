"""Write a run's front into README.md, between the marks <!-- front --> and <!-- /front -->.

    python examples/update_readme.py runs/resnet20

With --overhead FILE (benchmarks/engine_overhead.py --json FILE) the engine's overhead goes between its marks instead.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import yaml

from autocompress.studies.report import front_as_markdown
from autocompress.studies.study import Study

WITHIN = 0.05  # accuracy lost at most by the points shown
README = Path(__file__).parent.parent / "README.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--overhead", type=Path)
    arguments = parser.parse_args()
    if arguments.run:
        replace("front", front_section(arguments.run))
    if arguments.overhead:
        replace("overhead", overhead_section(json.loads(arguments.overhead.read_text())))


def front_section(folder: Path) -> str:
    """The run's front as Markdown, with where it was measured; points of no use to anyone are left out."""
    study = Study.open(folder)
    points, records = study.front(), study.records()
    base = next(point for point in points if point.baseline == "untouched").metrics["accuracy"].value
    left_out = sum(point.metrics["accuracy"].value < base - WITHIN for point in points)
    source = points[0].metrics["latency"].provenance
    workers = yaml.safe_load((folder / "config.yaml").read_text())["workers"]
    minutes = sum(record.seconds for record in records) / workers / 60
    where = f"{source.device}, {source.runtime}, {source.taken_at[:10]}"
    ends = f"{left_out} smaller points, which lose more than {WITHIN * 100:.0f} points of accuracy, are left out"
    return (
        f"{front_as_markdown(study, WITHIN)}\n{len(records)} trials in about {minutes:.0f} minutes; {where}; {ends}.\n"
    )


def overhead_section(rows: list[dict[str, object]]) -> str:
    """The benchmark's rows as a Markdown table."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns)]
    lines += [[f"{row[c]:.2f}" if isinstance(row[c], float) else str(row[c]) for c in columns] for row in rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def replace(mark: str, text: str) -> None:
    """Put `text` between the marks."""
    page = README.read_text()
    pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    README.write_text(pattern.sub(lambda found: found[1] + text + found[2], page))


if __name__ == "__main__":
    main()
