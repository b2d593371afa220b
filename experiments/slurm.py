"""Run a plan on a Slurm cluster: job arrays through submitit, whose tasks go on from checkpoints when requeued."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError

from analysis.runs import BadInput
from experiments.local import ATTEMPTS, log_of
from experiments.plan import Export, Run


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
    requeue: bool = True  # go on after a preemption

    def executor(self, folder: Path, after: str | None) -> submitit.AutoExecutor:
        """What submits to Slurm, `after` another array has finished."""
        executor = submitit.AutoExecutor(folder=folder / "slurm", cluster="slurm", slurm_max_num_timeout=1_000)
        additional = {"requeue": True} if self.requeue else {"no_requeue": True}
        if after:
            additional["dependency"] = f"afterok:{after}"
        executor.update_parameters(
            name=folder.name,
            timeout_min=int(60 * self.hours),
            cpus_per_task=self.cpus * self.side_by_side,
            slurm_array_parallelism=self.array_limit,
            slurm_additional_parameters=additional,
        )
        if self.memory_gb:
            executor.update_parameters(mem_gb=self.memory_gb * self.side_by_side)
        if self.partition:
            executor.update_parameters(slurm_partition=self.partition)
        if self.gpus:
            executor.update_parameters(gpus_per_node=self.gpus)
        return executor


class Task:
    """Some runs, side by side: what a task of the array calls."""

    def __init__(self, items: list[Run | Export], folder: Path, threads: int):
        self.items = items
        self.folder = folder
        self.threads = threads

    def __call__(self):
        """Run what is not finished. Raises RuntimeError if a run fails twice."""
        self.processes = []
        self.stopped = False
        signal.signal(signal.SIGTERM, lambda number, _frame: self.stop())  # a preemption, or scancel
        for _ in range(ATTEMPTS):
            waiting = [item for item in self.items if not item.result(self.folder)]
            self.processes = [self.start(item, place) for place, item in enumerate(waiting)]
            for process in self.processes:
                process.wait()
            if self.stopped:
                sys.exit(128 + signal.SIGTERM)
        failed = [item for item in self.items if not item.result(self.folder)]
        if failed:
            logs = ", ".join(str(log_of(item, self.folder)) for item in failed)
            raise RuntimeError(f"failed twice: see {logs}")

    def start(self, item: Run | Export, place: int) -> subprocess.Popen:
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        gpus = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
        log = log_of(item, self.folder)
        log.parent.mkdir(exist_ok=True)
        command = item.command(self.folder)
        with open(log, "a") as file:
            return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=file, stderr=file)

    def stop(self):
        """Let the runs write their checkpoints and end."""
        self.stopped = True
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait()

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit before a limit of time: the task is requeued as it is."""
        self.stop()
        return submitit.helpers.DelayedSubmission(Task(self.items, self.folder, self.threads))


def submit(plan: list[Run | Export], folder: Path, cluster: Cluster) -> list[str]:
    """Submit what is not finished, an array for each stage; return the arrays' numbers.

    Raises BadInput if there is no sbatch, or the cluster rejects the job: its own words are in the message.
    """
    if not shutil.which("sbatch"):
        raise BadInput("sbatch is not here: --cluster slurm is for a login node of a Slurm cluster.")
    numbers = []
    waiting = [item for item in plan if not item.result(folder)]
    for depth in sorted({depth_of(item) for item in waiting}):
        items = [item for item in waiting if depth_of(item) == depth]
        size = cluster.side_by_side
        groups = [items[start : start + size] for start in range(0, len(items), size)]
        tasks = [Task(group, folder.resolve(), cluster.cpus) for group in groups]
        executor = cluster.executor(folder, numbers[-1] if numbers else None)
        try:
            with executor.batch():
                jobs = [executor.submit(task) for task in tasks]
        except FailedJobError as error:
            raise BadInput(f"the cluster rejects the job: {' '.join(str(error).split())}") from None
        numbers.append(jobs[0].job_id.split("_")[0])
        (folder / "slurm" / "arrays.json").write_text(json.dumps(numbers))
    return numbers


def depth_of(item: Run | Export) -> int:
    """How many have to be finished before, one after the other."""
    return max((1 + depth_of(needed) for needed in item.needs), default=0)


def check_arrays(folder: Path):
    """Raise BadInput if arrays of this plan are on the cluster."""
    path = folder / "slurm" / "arrays.json"
    if not path.exists() or not shutil.which("squeue"):
        return
    numbers = ",".join(json.loads(path.read_text()))
    command = ["squeue", "--noheader", "--format", "%A", "--jobs", numbers]
    living = set(subprocess.run(command, capture_output=True, text=True).stdout.split())
    if living:
        raise BadInput(f"runs of this plan are on the cluster: wait for them, or scancel {numbers.replace(',', ' ')}.")
