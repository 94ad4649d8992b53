"""The scripts and manifests in the pages on launching, which readers copy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from clipft.core.errors import ClipftError, Interrupted
from tests.conftest import write_shard
from tests.documents import ROOT, SHELLS, Block, blocks, shell_lines
from tests.training.process_helpers import free_port

LAUNCH = ROOT / "docs" / "launch"
PAGES = sorted(LAUNCH.glob("*.md"))

SRUN = """#!/bin/bash
# Stands in for SLURM: two tasks on this machine, warned once, as soon as $WARN_WHEN exists
shift
export SLURM_JOB_NODELIST=localhost SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=1
pids=()
for rank in 0 1; do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" &
  pids+=($!)
done
if [ ! -e requeued ]; then
  until [ -e "$WARN_WHEN" ] || ! kill -0 "${pids[0]}"; do sleep 0.05; done
  kill -TERM "${pids[@]}"
fi
highest=0
for pid in "${pids[@]}"; do
  wait "$pid" || { code=$?; [ $code -gt $highest ] && highest=$code; }
done
exit $highest
"""
SCONTROL = '#!/bin/bash\necho "$@" >> requeued\n'


def manifests(page: str) -> list[dict]:
    texts = [block.text for block in blocks(LAUNCH / page) if block.kind == "yaml"]
    return [part for text in texts for part in yaml.safe_load_all(text)]


def job_script(folder: Path) -> Path:
    """Write the script of the page to a file. Its shared folder is in ``folder``."""
    (script,) = [block.text for block in blocks(LAUNCH / "slurm.md") if block.kind == "bash"]
    path = folder / "train.sbatch"
    path.write_text(script.replace("/shared/", f"{folder}/"))
    return path


def submit(folder: Path, srun: str, **environment: str) -> int:
    """Run the job script with stand-ins for SLURM's commands and return its exit code."""
    for name, text in (("srun", srun), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    environ = os.environ | {"PATH": path, "SLURM_JOB_ID": str(free_port())} | environment
    done = subprocess.run(["bash", str(job_script(folder))], cwd=folder, env=environ)
    return done.returncode


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_the_shell_of_a_page_is_valid(page):
    scripts = [
        block.text if block.kind in SHELLS else "\n".join(shell_lines(block))
        for block in blocks(page)
    ]
    assert any("clipft train" in script for script in scripts)
    for script in filter(None, scripts):
        subprocess.run(["bash", "-n", "-u"], input=script, text=True, check=True)


@pytest.mark.parametrize(("code", "again"), [(0, False), (75, True), (2, False), (7, False)])
def test_a_slurm_job_is_requeued_only_if_its_state_was_saved(code, again, tmp_path):
    assert submit(tmp_path, f"#!/bin/bash\nexit {code}\n") == code
    assert (tmp_path / "requeued").exists() == again


@pytest.mark.slow
def test_a_slurm_job_that_is_warned_continues_when_it_runs_again(tmp_path):
    write_shard(tmp_path / "catalogue" / "train" / "00000.tar", range(60))
    write_shard(tmp_path / "catalogue" / "val" / "00000.tar", range(1000, 1030))
    small = {
        **{"CLIPFT_MODEL": "tiny", "CLIPFT_DEVICE": "cpu", "CLIPFT_NUM_WORKERS": "0"},
        **{"CLIPFT_EPOCHS": "20", "CLIPFT_EFFECTIVE_BATCH_SIZE": "20", "OMP_NUM_THREADS": "1"},
        **{"CLIPFT_CHECKPOINT_EVERY": "1", "CLIPFT_STOP_ON": "never"},
    }
    checkpoint = tmp_path / "runs" / "dual_lora_checkpoint.pt"
    assert submit(tmp_path, SRUN, WARN_WHEN=str(checkpoint), **small) == Interrupted.exit_code
    assert len((tmp_path / "requeued").read_text().split()) == 2
    assert not (tmp_path / "runs" / "dual_lora" / "result.json").exists()
    assert submit(tmp_path, SRUN, **small) == 0
    steps = (tmp_path / "runs" / "dual_lora" / "metrics.jsonl").read_text().count('"kind": "step"')
    assert steps == 60


def test_a_saved_state_is_continued_and_a_mistake_is_not_repeated():
    """The manifests decide by the exit code whether a job is restarted."""
    mistakes = {kind.exit_code for kind in ClipftError.__subclasses__()} - {75}
    one, _, several = manifests("kubernetes.md")
    rules = one["spec"]["podFailurePolicy"]["rules"]
    codes = {
        rule["action"]: rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule
    }
    assert codes["Ignore"] == [Interrupted.exit_code] and set(codes["FailJob"]) <= mistakes
    single, _ = manifests("skypilot.md")
    recovery = single["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [Interrupted.exit_code]
    # The exit code of torchrun is always 1, so it cannot be used
    policy = several["spec"]["podFailurePolicy"]["rules"]
    assert [list(rule) for rule in policy] == [["action", "onPodConditions"]]


def test_the_containers_have_time_to_save():
    for job in (part for part in manifests("kubernetes.md") if part["kind"] == "Job"):
        pod = job["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        environ = {item["name"]: int(item["value"]) for item in container.get("env", [])}
        waits = environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 0)
        assert waits < pod["terminationGracePeriodSeconds"]
        assert pod["restartPolicy"] == "Never", "a failure policy needs it"
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_lines_of_a_manifest_and_of_a_program_are_found():
    """Otherwise the tests of their options would pass without any commands."""
    for page, count in (("kubernetes.md", 2), ("skypilot.md", 2), ("sagemaker.md", 2)):
        lines = [line for block in blocks(LAUNCH / page) for line in shell_lines(block)]
        assert sum("clipft train" in line for line in lines) == count
    assert shell_lines(Block("toml", "clipft train", False, False)) == []
