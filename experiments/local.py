"""Run a plan on this machine: several runs at a time, each of which goes on where it was stopped."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

from analysis.runs import BadInput
from experiments.plan import Export, Run
from experiments.record import Record

ATTEMPTS = 2
PROGRESS = re.compile(r"(\d+)/\d+ \[(?:.*?return (-?[\d.]+|nan))?")  # tqdm's line in a run's log


class Job:
    """A run that is going on in a process of its own."""

    def __init__(self, item: Run | Export, folder: Path, environment: dict, lock: int):
        self.item = item
        self.log = log_of(item, folder)
        self.log.parent.mkdir(exist_ok=True)
        self.began = time.monotonic()
        with open(self.log, "w") as log:
            # in a session of its own, so that Ctrl-C reaches it from here alone; the lock is held while it lives
            self.process = subprocess.Popen(
                item.command(folder),
                cwd=folder,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock],
            )

    def progress(self) -> tuple[int, str]:
        """The step it has reached and the last return, as far as its log has them."""
        found = PROGRESS.findall(self.log.read_text(errors="replace")) or [("0", "")]
        return int(found[-1][0]), found[-1][1]

    def speed(self) -> float:
        """Agent steps per second since this start; 0 as long as it is not known."""
        found = PROGRESS.findall(self.log.read_text(errors="replace")) or [("0", "")]
        return (int(found[-1][0]) - int(found[0][0])) / (time.monotonic() - self.began)

    def kill(self, number: int):
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)


def log_of(item: Run | Export, folder: Path) -> Path:
    return folder / "logs" / f"{item.name.replace('/', '-')}.log"


class Launcher:
    """Works through a plan, `jobs` processes at a time."""

    def __init__(self, plan: list[Run | Export], folder: Path, jobs: int, threads: int, record: Record):
        self.folder = folder
        self.jobs = jobs
        self.record = record
        self.lock = take_lock(folder)
        self.done = [item for item in plan if item.result(folder) or item in record]
        self.waiting = [item for item in plan if item not in self.done]
        self.going: dict[int, Job] = {}  # by place
        self.failed: list[Run | Export] = []
        self.attempts: Counter = Counter()
        self.stopped_by: list[int] = []
        self.speeds: dict = defaultdict(list)  # steps per second of finished runs, by their kind
        self.threads = threads or max(1, count_cores() // jobs)
        self.gpus = list_gpus()

    def run(self) -> int:
        """Return the exit status: 0 if all is finished, 1 if some failed, 128 + a signal if it was stopped by one."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)
        display = Display(self)
        try:
            while self.going or (self.next_item() and not self.stopped_by):
                for place in range(self.jobs):
                    if place not in self.going and not self.stopped_by and self.next_item():
                        self.start(place)
                for place, job in list(self.going.items()):
                    if job.process.poll() is not None:
                        del self.going[place]
                        display.say(self.ended(job))
                display.show()
                time.sleep(0.2)
        finally:
            for job in self.going.values():
                job.kill(signal.SIGTERM)
            display.close()
        return self.report()

    def next_item(self) -> Run | Export | None:
        """The first that waits for nothing but a place."""
        for item in self.waiting:
            if all(needed.result(self.folder) for needed in item.needs):
                return item
        return None

    def start(self, place: int):
        item = self.next_item()
        self.waiting.remove(item)
        self.attempts[item] += 1
        environment = {"OMP_NUM_THREADS": str(self.threads)}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[place % len(self.gpus)]
        self.going[place] = Job(item, self.folder, environment, self.lock)

    def ended(self, job: Job) -> str:
        """Note that a run is finished, or has to be tried once more, or has failed; say so."""
        item = job.item
        if item.result(self.folder):
            self.done.append(item)
            self.speeds[item.kind].append(job.speed())
            self.record.add(item, self.folder)
            return f"finished: {item.name}, in {timedelta(seconds=int(time.monotonic() - job.began))}"
        if self.stopped_by:
            self.waiting.append(item)
            return f"stopped: {item.name}"
        if self.attempts[item] < ATTEMPTS:
            self.waiting.insert(0, item)
            return f"failed, and tried once more: {item.name}"
        self.failed.append(item)
        return f"failed: {item.name}"

    def stop(self, number: int, _frame):
        """Let every run end with a checkpoint; a second Ctrl-C ends them at once."""
        for job in self.going.values():
            job.kill(signal.SIGKILL if self.stopped_by else signal.SIGTERM)
        self.stopped_by.append(number)

    def report(self) -> int:
        """Say what is not finished, and why; return the exit status."""
        if self.stopped_by:
            print("stopped: the same command goes on with what is not finished")
            return 128 + self.stopped_by[0]
        for item in self.failed:
            log = log_of(item, self.folder)
            lines = log.read_text(errors="replace").splitlines()[-5:]
            print(f"failed: {item.name}; {log} ends with:", *lines, sep="\n  ", file=sys.stderr)
        for item in self.waiting:
            print(f"not started, as what it needs has failed: {item.name}", file=sys.stderr)
        return 1 if self.failed else 0

    def seconds_left(self) -> float | None:
        """How long all that is not finished will take; None as long as no run has told its speed."""
        speeds = {kind: list(known) for kind, known in self.speeds.items()}
        for job in self.going.values():
            if job.speed() > 0:
                speeds.setdefault(job.item.kind, []).append(job.speed())
        every = [speed for known in speeds.values() for speed in known if speed > 0]
        if not every:
            return None
        steps_left = [(item.kind, item.steps) for item in self.waiting]
        steps_left += [(job.item.kind, job.item.steps - job.progress()[0]) for job in self.going.values()]
        seconds = 0.0
        for kind, steps in steps_left:
            known = [speed for speed in speeds.get(kind, []) if speed > 0] or every
            seconds += sum(steps / speed for speed in known) / len(known)
        return seconds / self.jobs


class Display:
    """A table that is drawn anew every second: the plan, and a line for each run that is going on.

    Where the output is no terminal, plain lines every minute.
    """

    def __init__(self, launcher: Launcher):
        self.launcher = launcher
        self.terminal = sys.stderr.isatty()
        self.next_at = 0.0
        self.bars = []
        if self.terminal:
            for place in range(launcher.jobs + 1):
                self.bars.append(tqdm(bar_format="{desc}", position=place, leave=place == 0))

    def show(self):
        if time.monotonic() < self.next_at:
            return
        self.next_at = time.monotonic() + (1 if self.terminal else 60)
        lines = self.lines()
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            for bar, line in zip(self.bars, lines, strict=True):
                bar.set_description_str(line[:width])
        else:
            print(*[line for line in lines if line], sep="\n", flush=True)

    def lines(self) -> list[str]:
        launcher = self.launcher
        left = launcher.seconds_left()
        left = "time left not known yet" if left is None else f"{timedelta(seconds=int(left))} left"
        counts = f"{len(launcher.done)} done, {len(launcher.going)} going on, {len(launcher.waiting)} to come"
        failed = f", {len(launcher.failed)} failed" if launcher.failed else ""
        lines = [f"runs: {counts}{failed}; {left}"]
        for place in range(launcher.jobs):
            job = launcher.going.get(place)
            lines.append(self.line(job) if job else "")
        return lines

    def line(self, job: Job) -> str:
        step, last_return = job.progress()
        told = f"{step:,} of {job.item.steps:,} steps, {job.speed():,.0f} steps/s, return {last_return or '-'}"
        return f"  {job.item.name}: {told}"

    def say(self, text: str):
        """Print a line above the table."""
        if self.terminal:
            tqdm.write(text)
        else:
            print(text, flush=True)

    def close(self):
        self.next_at = 0.0
        self.show()
        for bar in self.bars:
            bar.close()


def take_lock(folder: Path) -> int:
    """Lock the plan's folder for this process and its runs. Raises BadInput if another process has it."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise BadInput(f"{folder} is in use by another process, or by runs that one has left behind.") from None
    return lock


def count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def list_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to, one by one."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return [str(number) for number, line in enumerate(listed.splitlines()) if line.startswith("GPU")]
