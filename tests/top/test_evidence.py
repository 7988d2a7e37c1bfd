"""The evidence script, made small: three runs trained, evaluated, analysed and compared by the real command lines."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hacl_llava.checkpoints import hub

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.e2e
def test_from_nothing_to_a_report(tmp_path):
    command = [sys.executable, "benchmarks/evidence.py", "--small", "--output", str(tmp_path)]
    command += ["--docs", str(tmp_path / "docs")]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    tasks = {"POPE mini random", "POPE mini popular", "POPE mini adversarial", "CHAIR"}
    for name in ("plain", "hacl"):
        assert tasks <= {entry["task"] for entry in hub.read_evaluation(tmp_path / name / "eval/evaluation.json")}
        counts = json.loads((tmp_path / name / "eval/pope-mini-random/results.json").read_text())["counts"]
        assert counts["scored"] == counts["questions"] > 40 and counts["failed"] == 0
    models = {
        m["name"]: m["spaces"]["llm"] for m in json.loads((tmp_path / "analysis/analysis.json").read_text())["models"]
    }
    assert list(models) == ["untrained", "plain", "hacl"]
    for space in models.values():
        assert set(space["closer_to_true_by_kind"]) >= {"existence", "attribute", "quantity", "location"}
    # A learning rate of 0 trained nothing, the others did; that it was the same start, the seed says.
    values = [space["measures"]["alignment"]["value"] for space in models.values()]
    assert len(set(values)) == 3
    page = (tmp_path / "report/report.html").read_text()
    assert all(f"{name}" in page for name in models) and page.count("data:image/png") >= 3
    for folder in ("analysis", "report"):  # pages for docs/, with their pictures beside them
        text, pictures = (
            (tmp_path / "docs" / folder / "report.md").read_text(),
            (tmp_path / "docs" / folder).glob("*.png"),
        )
        assert (
            all(f'src="{picture.name}"' in text for picture in pictures) and "base64" not in text and "\n\n" not in text
        )
    # The same command again finds everything made, and ends with the same figures.
    report = json.loads((tmp_path / "report/report.json").read_text())
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "pretrain_hacl.py" not in again.stdout
    other = json.loads((tmp_path / "report/report.json").read_text())
    for value in (report, other):
        value.pop("provenance")
    assert other == report
