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
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)  # the last is Slurm's, before a limit of time
# tqdm's line in a run's log: 500/1000 [00:10<00:10, 50.0 steps/s, return 1.5, epsilon 0.1], or 2.0s/ steps
PROGRESS = re.compile(r"(\d+)/\d+ \[[^,]*, *(?:([\d.]+) steps/s|([\d.]+)s/ steps)(?:, return (-?[\d.]+|nan))?")


class Job:
    """A run that is going on in a process of its own."""

    def __init__(self, item: Run | Export, folder: Path, environment: dict, lock: int | None):
        self.item = item
        self.log = log_of(item, folder)
        self.log.parent.mkdir(exist_ok=True)
        self.began = time.monotonic()
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                item.command(folder),
                cwd=folder,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that Ctrl-C reaches it from here alone
                pass_fds=[lock] if lock else [],  # which it holds as long as it lives
                preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),  # that is for the task
            )

    def progress(self) -> tuple[int, float, str]:
        """Its step, its steps per second and its last return, as its log had them last; 0, 0 and "" before."""
        found = PROGRESS.findall(self.log.read_text(errors="replace"))
        if not found:
            return 0, 0.0, ""
        step, speed, seconds, last_return = found[-1]
        return int(step), float(speed) if speed else 1 / float(seconds), last_return

    def kill(self, number: int):
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)


def log_of(item: Run | Export, folder: Path) -> Path:
    return folder / "logs" / f"{item.name.replace('/', '-')}.log"


class Launcher:
    """Works through a plan, `jobs` processes at a time."""

    def __init__(
        self,
        plan: list[Run | Export],
        folder: Path,
        jobs: int,
        threads: int,  # of each process
        record: Record,
        lock: int | None = None,  # of the folder
        keep_checkpoints: bool = False,  # of finished runs
    ):
        self.folder = folder
        self.jobs = jobs
        self.threads = threads
        self.record = record
        self.lock = lock
        self.keep_checkpoints = keep_checkpoints
        self.done: list[Run | Export] = []
        self.waiting: list[Run | Export] = []
        self.going: dict[int, Job] = {}  # by slot
        self.failed: list[Run | Export] = []
        self.attempts: Counter = Counter()
        self.speeds: dict = defaultdict(list)  # steps per second of finished runs, by their kind
        self.stopped_by: list[int] = []
        self.gpus = list_gpus()
        for item in plan:
            if item.result(folder):
                self.finish(item)
            elif item in record:
                self.done.append(item)
            else:
                self.waiting.append(item)

    def run(self) -> int:
        """Return the exit status: 0 if all is finished, 1 if some failed, 128 + a signal if it was stopped by one."""
        handlers = [signal.signal(number, lambda number, _: self.stopped_by.append(number)) for number in SIGNALS]
        display = Display(self)
        told = 0  # signals that the runs have been told of
        try:
            while self.going or (self.next_item() and not self.stopped_by):
                for slot in range(self.jobs):
                    if slot not in self.going and self.next_item() and not self.stopped_by:
                        self.start(slot)
                if told < len(self.stopped_by):
                    told = len(self.stopped_by)
                    self.stop()
                for slot, job in list(self.going.items()):
                    if job.process.poll() is not None:
                        del self.going[slot]
                        display.say(self.ended(job))
                display.show()
                time.sleep(0.2)
        finally:
            for job in self.going.values():
                job.kill(signal.SIGTERM)
        display.close()
        for number, handler in zip(SIGNALS, handlers, strict=True):
            signal.signal(number, handler)
        return self.report()

    def next_item(self) -> Run | Export | None:
        """The first that waits for nothing but a slot."""
        for item in self.waiting:
            if all(needed.result(self.folder) for needed in item.needs):
                return item
        return None

    def start(self, slot: int):
        item = self.next_item()
        self.waiting.remove(item)
        self.attempts[item] += 1
        environment = {"OMP_NUM_THREADS": str(self.threads)}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        self.going[slot] = Job(item, self.folder, environment, self.lock)

    def stop(self):
        """Let every run end with a checkpoint; after a second Ctrl-C, at once."""
        at_once = self.stopped_by.count(signal.SIGINT) > 1
        for job in self.going.values():
            job.kill(signal.SIGKILL if at_once else signal.SIGTERM)

    def ended(self, job: Job) -> str:
        """Note that a run is finished, or has to be tried once more, or has failed; say so."""
        item = job.item
        if item.result(self.folder):
            self.speeds[item.kind].append(job.progress()[1])
            self.finish(item)
            return f"finished: {item.name}, in {timedelta(seconds=int(time.monotonic() - job.began))}"
        if self.stopped_by:
            self.waiting.append(item)
            return f"stopped: {item.name}"
        if self.attempts[item] < ATTEMPTS:
            self.waiting.insert(0, item)
            return f"failed, and tried once more: {item.name}"
        self.failed.append(item)
        return f"failed: {item.name}"

    def finish(self, item: Run | Export):
        """Record a run, and remove its checkpoint, which has the whole replay."""
        self.done.append(item)
        if isinstance(item, Run) and not item.is_recording:
            if item not in self.record:
                try:
                    self.record.add(item, self.folder)
                except BadInput as error:  # its log is broken
                    tqdm.write(f"warning: not recorded: {error}")
            if not self.keep_checkpoints:
                (item.result(self.folder) / "checkpoint.pt").unlink(missing_ok=True)

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
            print(f"not started, as what it needs is not there: {item.name}", file=sys.stderr)
        return 1 if self.failed or self.waiting else 0

    def seconds_left(self) -> float | None:
        """How long all that is not finished will take; None as long as no run has told its speed."""
        speeds = {kind: [speed for speed in known if speed > 0] for kind, known in self.speeds.items()}
        ahead = [(item.kind, item.steps) for item in self.waiting]
        going = []
        for job in self.going.values():
            step, speed, _ = job.progress()
            going.append((job.item.kind, job.item.steps - step))
            if speed > 0:
                speeds.setdefault(job.item.kind, []).append(speed)
        every = [speed for known in speeds.values() for speed in known]
        if not every:
            return None

        def seconds(kind: tuple, steps: int) -> float:
            known = speeds.get(kind) or every
            return sum(steps / speed for speed in known) / len(known)

        longest = max((seconds(*each) for each in going), default=0.0)
        return max(longest, sum(seconds(*each) for each in ahead + going) / self.jobs)


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
            for number in range(launcher.jobs + 1):
                self.bars.append(tqdm(bar_format="{desc}", position=number, leave=number == 0))

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
        for slot in range(launcher.jobs):
            job = launcher.going.get(slot)
            lines.append(self.line(job) if job else "")
        return lines

    def line(self, job: Job) -> str:
        step, speed, last_return = job.progress()
        told = f"{step:,} of {job.item.steps:,} steps, {speed:,.1f} steps/s, return {last_return or '-'}"
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
