"""What the README shows runs as it stands."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_python_blocks_run(index):
    if "transformers" in BLOCKS[index]:
        pytest.importorskip("transformers")
    exec(compile(BLOCKS[index], f"README.md, block {index}", "exec"), {})


def test_there_are_python_blocks():
    assert len(BLOCKS) >= 2


def test_files_it_names_exist():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"train/configs/\w+\.yaml|(?<=\()[A-Z]+\.md", text))
    assert named and not [name for name in named if not (ROOT / name).exists()]


def test_speed_tables_are_the_records():
    from benchmarks.report import with_speed

    text = (ROOT / "README.md").read_text()
    assert with_speed(text) == text, "run python benchmarks/report.py"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_clean_keeps_data_sets_and_runs(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept = [tmp_path / "runs" / "ade20k" / "last.pt", tmp_path / "data" / "ADEChallengeData2016" / "x.jpg"]
    gone = [tmp_path / "runs" / "demo" / "last.pt", tmp_path / "data" / "generated" / "x.jpg"]
    kept.append(tmp_path / "data" / "generated-abcd-mine" / "x.jpg")
    gone.append(tmp_path / "data" / "generated-0123abcd" / "x.jpg")
    for path in kept + gone:
        path.parent.mkdir(parents=True)
        path.touch()
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert [path.exists() for path in kept + gone] == [True] * 3 + [False] * 3
