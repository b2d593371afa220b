"""Run a plan on a Slurm cluster: job arrays through submitit, whose tasks go on from checkpoints when requeued."""

import json
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError

from analysis.runs import BadInput
from experiments.local import Launcher
from experiments.plan import Export, Run
from experiments.record import Record

LARGEST_ARRAY = 1_000  # Slurm's usual MaxArraySize


@dataclass
class Cluster:
    """What every task of the array asks for."""

    partition: str | None = None  # of the cluster (default: the cluster's)
    hours: float = 24.0  # until a task is stopped; it is requeued then, and goes on
    gpus: int = 0  # of a task, shared by its runs
    cpus: int = 1  # of a run: its threads
    memory_gb: float = 12.0  # of a run (0: the cluster's default)
    side_by_side: int = 1  # runs in a task
    array_limit: int = 256  # tasks at a time
    requeue: bool = True  # go on after a preemption or the end of --hours

    def check(self):
        """Raise BadInput if there is no sbatch, or a number is none."""
        if not shutil.which("sbatch"):
            raise BadInput("sbatch is not here: --cluster slurm is for a login node of a Slurm cluster.")
        if min(self.cpus, self.side_by_side, self.array_limit) < 1 or self.hours <= 0:
            raise BadInput("--cpus, --side-by-side and --array-limit must be at least 1, --hours more than 0.")

    def executor(self, folder: Path, after: list[str]) -> submitit.AutoExecutor:
        """What submits to Slurm, `after` other arrays have ended."""
        executor = submitit.AutoExecutor(folder=folder / "slurm", cluster="slurm")
        cpus = self.cpus * self.side_by_side
        additional = {"requeue": True} if self.requeue else {"no_requeue": True}
        if after:
            additional["dependency"] = ":".join(["afterany", *after])
        executor.update_parameters(
            name=folder.name,
            timeout_min=max(int(60 * self.hours), 1),
            cpus_per_task=cpus,
            slurm_srun_args=[f"--cpus-per-task={cpus}"],  # which srun does not take over from sbatch since Slurm 22.05
            slurm_signal_delay_s=min(300, int(900 * self.hours)),  # for the checkpoints, before the hours are over
            slurm_array_parallelism=self.array_limit,
            slurm_additional_parameters=additional,
        )
        if self.partition:
            executor.update_parameters(slurm_partition=self.partition)
        if self.gpus:
            executor.update_parameters(gpus_per_node=self.gpus)
        if self.memory_gb:
            executor.update_parameters(mem_gb=self.memory_gb * self.side_by_side)
        return executor


@dataclass
class Task:
    """Some runs, side by side: what a task of the array calls."""

    items: list[Run | Export]
    folder: Path
    threads: int
    keep_checkpoints: bool

    def __call__(self):
        """Run what is not finished. Raises RuntimeError if a run fails."""
        jobs = len(self.items)
        keep = self.keep_checkpoints
        launcher = Launcher(self.items, self.folder, jobs, self.threads, Record(None), keep_checkpoints=keep)
        status = launcher.run()
        if signal.SIGUSR2 in launcher.stopped_by:  # the hours are over
            name = os.environ["SLURM_JOB_ID"]
            subprocess.run(["scontrol", "requeue", name], check=True)
        if launcher.stopped_by:  # a preemption, too: Slurm ends and requeues the task
            signal.pause()
        if status:
            raise RuntimeError(f"runs have failed: see {self.folder / 'logs'}")


def submit(
    plan: list[Run | Export], folder: Path, cluster: Cluster, record: Record, keep_checkpoints: bool
) -> list[str]:
    """Submit what is not finished, in arrays; return their numbers.

    Raises BadInput if the cluster rejects the job: its own words are in the message.
    """
    waiting = [item for item in plan if not item.result(folder) and item not in record]
    numbers, before = [], []
    for depth in sorted({depth_of(item) for item in waiting}):
        items = [item for item in waiting if depth_of(item) == depth]
        size = cluster.side_by_side
        tasks = []
        for start in range(0, len(items), size):
            tasks.append(Task(items[start : start + size], folder.resolve(), cluster.cpus, keep_checkpoints))
        made = []
        for start in range(0, len(tasks), LARGEST_ARRAY):
            executor = cluster.executor(folder, before)
            try:
                with executor.batch():
                    jobs = [executor.submit(task) for task in tasks[start : start + LARGEST_ARRAY]]
            except FailedJobError as error:
                raise BadInput(f"the cluster rejects the job: {' '.join(str(error).split())}") from None
            made.append(jobs[0].job_id.split("_")[0])
            numbers.append(made[-1])
            (folder / "slurm" / "arrays.json").write_text(json.dumps(numbers))
        before = made
    return numbers


def depth_of(item: Run | Export) -> int:
    """How many have to be finished before, one after the other."""
    return max((1 + depth_of(needed) for needed in item.needs), default=0)


def check_arrays(folder: Path):
    """Raise BadInput if arrays of this plan are on the cluster."""
    path = folder / "slurm" / "arrays.json"
    if not path.exists():
        return
    numbers = json.loads(path.read_text())
    if not shutil.which("squeue"):
        raise BadInput(f"arrays {' '.join(numbers)} may be on a cluster: remove {path} if they are not.")
    command = ["squeue", "--noheader", "--format", "%A", "--jobs", ",".join(numbers)]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode and "Invalid job id" not in listed.stderr:
        raise BadInput(f"squeue cannot tell what is on the cluster: {' '.join(listed.stderr.split())}")
    if listed.stdout.split():
        raise BadInput(f"runs of this plan are on the cluster: wait for them, or scancel {' '.join(numbers)}.")
