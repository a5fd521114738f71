"""Kill a run, cut its power, fill its disk, damage its files, start it twice: its result must equal the undisturbed run's.

python scripts/torture.py                            everything, on the smallest settings of the embedded model: minutes
python scripts/torture.py --short                    fewer disturbances of each kind: under a minute
python scripts/torture.py --only kills --only disk   some parts
python scripts/torture.py model.path=<folder> ...    with other settings

It compares the adapter, all files of the audit, and metrics.jsonl without its seconds, bit by bit, on a CPU. Linux only.
"""

import argparse
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from disturbances import PowerLoss, at_write, count_writes, cut, full, kill, nobody_reads
from safetensors.numpy import load_file
from torch.distributed import TCPStore

from fairdiff import jobs, start  # noqa: F401  (what `start` would import in every child)
from fairdiff.training import checkpoint, trainer
from fairdiff.training.tracking import read_metrics

SETTINGS = [
    "steps=3", "global_batch=4", "noise_pool=4", "sampler.train_steps=[2,2]", "sampler.audit_steps=2",
    "adapter=lora_text", "audit.prompts=2", "audit.images_per_prompt=2", "audit.named=1", "audit.without_people=1",
    "audit.named=null",
]  # fmt: skip
PATIENCE = 300  # seconds that one run may take
Disturb = Callable[[], None]


class Run:
    """A run of train.py in a fork of this process, which has all imports. It writes a checkpoint at every step.

    names: environment variables.
    """

    def __init__(self, folder: Path, cache: Path, disturb: Disturb | None = None, names: dict[str, str] | None = None):
        self.folder, self.began = folder, time.monotonic()
        (self.out, out), (self.err, err) = os.pipe(), os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            os.close(out)
            os.close(err)
            return
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
            trainer.CHECKPOINT_EVERY = 1
            os.environ.update(names or {})
            sys.argv = ["train.py", *SETTINGS, f"cache={cache}", f"hydra.run.dir={folder}"]
            if disturb:
                disturb()
            start.train()
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(OSError):  # the reader may have gone
                sys.stderr.flush()
                sys.stdout.flush()
            os._exit(code)

    def end(self, after: float = PATIENCE, how: signal.Signals = signal.SIGKILL) -> tuple[int, str, str]:
        """Return exit code (negative: the signal), stdout and stderr. `how` is sent if it runs more than `after` seconds."""
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() - self.began > after:
                os.kill(self.pid, how)
                after = PATIENCE
            time.sleep(0.005)
        said = []
        for pipe in (self.out, self.err):  # the output of a run fits into a pipe's buffer
            with os.fdopen(pipe, encoding="utf-8") as file:
                said.append(file.read())
        return os.waitstatus_to_exitcode(ended[1]), *said


def left(folder: Path) -> dict[str, object]:
    """Return the compared files of a finished run by name."""
    found: dict[str, object] = {"metrics": [row | {"seconds": 0} for row in read_metrics(folder / "metrics.jsonl")]}
    for path in sorted(p for part in ("adapter", "audits") for p in (folder / part).rglob("*") if p.is_file()):
        name, tensors = path.relative_to(folder).as_posix(), path.suffix == ".safetensors"
        found[name] = {k: v.tobytes() for k, v in load_file(path).items()} if tensors else path.read_bytes()
    return found


class Torture:
    """Disturb runs and compare them with an undisturbed one. rng: chooses the moments. count: number of kills; there are a
    third as many of each other disturbance.
    """

    def __init__(self, work: Path, rng: random.Random, count: int):
        self.work, self.rng, self.count, self.some = work, rng, count, math.ceil(count / 3)
        self.wrong: list[str] = []
        self.open: Path | None = None  # the folder of a disturbed run that is not finished
        self.cache, self.number = work / "cache0", 0
        self.cache.mkdir()
        began, events = time.monotonic(), work / "events"
        self.whole, self.expected = self.folder(), None
        self.finish(self.whole, disturb=lambda: count_writes(events))
        if self.wrong:
            sys.exit("the undisturbed run did not end well")
        self.seconds, self.writes = time.monotonic() - began, int(events.read_bytes())
        print(f"undisturbed: {self.seconds:.1f} s, {self.writes} writes", flush=True)

    def folder(self) -> Path:
        """Make a new run folder."""
        self.number += 1
        folder = self.work / f"run{self.number}"
        folder.mkdir()
        return folder

    def check(self, good: bool, said: str) -> None:
        if not good:
            self.wrong.append(said)
            print(f"WRONG: {said}", flush=True)

    def compare(self, folder: Path, whole: dict[str, object] | None = None) -> None:
        """Check that a run's files equal those of the undisturbed run, by default the one with a single process."""
        found = left(folder)
        self.expected = self.expected or found
        expected = whole or self.expected
        names = [n for n in found | expected if found.get(n) != expected.get(n)]
        self.check(not names, f"{folder.name}: not as undisturbed: {', '.join(names)}")

    def finish(self, folder: Path, cache: Path | None = None, disturb: Disturb | None = None) -> str:
        """Let a run end by itself, compare its files, and return its stdout."""
        code, out, err = Run(folder, cache or self.cache, disturb).end()
        self.check(code == 0 and not err, f"{folder.name}: ended with {code}: {err}")
        if code == 0:
            self.compare(folder)
        return out

    def ended(self, ended: tuple[int, str, str], codes: tuple[int, ...], what: str) -> int:
        """Check and return the exit code: 0 or one of `codes`. A positive code must come with one line on stderr."""
        code, _, err = ended
        good = code in (0, *codes) and (code <= 0 or len(err.strip().splitlines()) == 1)
        self.check(good, f"{what}: ended with {code}: {err}")
        return code

    def disturb(self, ways: list[Callable[[Path], int]]) -> None:
        """Disturb a run in these ways, one after the other. If the run finishes first, a new one is started."""
        for way in ways:
            while (folder := self.open or self.folder()) and way(folder) == 0:
                self.compare(folder)
                self.open = None
            self.open = folder

    def close(self) -> None:
        """Finish the last disturbed run, without a terminal."""
        if self.open:
            self.finish(self.open, disturb=lambda: (os.setsid(), os.close(0)))

    def moment(self) -> float:
        """Return after how many seconds to disturb. Late parts of a run are reached because it resumes."""
        return self.rng.uniform(0, 0.7) * self.seconds

    def some_cache(self) -> Path:
        """Return the cache folder, sometimes a new empty one, so that its writes are disturbed too."""
        if self.rng.random() < 0.3:
            self.cache = self.work / f"cache{len(list(self.work.glob('cache*')))}"
            self.cache.mkdir()
        return self.cache

    # the parts

    def kills(self) -> None:
        """SIGKILL at random moments of training and audit."""

        def way(folder: Path) -> int:
            run = Run(folder, self.some_cache())
            return self.ended(run.end(self.moment()), (-signal.SIGKILL,), "killed")

        self.disturb([way] * self.count)

    def writes_cut(self) -> None:
        """SIGKILL and loss of power during writes: before and after a rename, and with a partly written file."""

        def way(folder: Path, name: str) -> int:
            place, cache, names = self.rng.randint(1, self.writes // 2), self.some_cache(), self.rng.random() < 0.5
            acts = {"kill": lambda: kill, "cut": lambda: cut, "power": lambda: PowerLoss(names, folder, cache)}
            run = Run(folder, cache, lambda: at_write(place, acts[name]()))
            return self.ended(run.end(), (-signal.SIGKILL,), f"{name} at write {place}")

        self.disturb([partial(way, name=name) for name in ("kill", "cut", "power")] * self.some)

    def checkpoints(self) -> None:
        """A damaged newest checkpoint: the run must use the one before it, and print that."""
        for share in (0.99, 0.5, 0)[: self.count]:
            folder = self.folder()
            shutil.copytree(self.whole, folder, dirs_exist_ok=True)
            shutil.rmtree(folder / "audits")
            path = folder / "checkpoints" / checkpoint.NAME
            path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
            out = self.finish(folder)
            said = "thecheckpointbeforeitistaken" in "".join(out.split())  # it may be wrapped
            self.check(said, f"nothing said of a damaged checkpoint: {out}")

    def disk(self) -> None:
        """A disk that is full at some sizes of a file, and at some of the writes."""
        folder, cache = self.folder(), self.work / "full"
        sizes = [0, 100, 1000, 5000, 20_000, 50_000, 100_000, 200_000]
        for size in sorted(self.rng.sample(sizes, min(self.some, len(sizes)))):
            run = Run(folder, cache, lambda s=size: resource.setrlimit(resource.RLIMIT_FSIZE, (s, s)))
            self.ended(run.end(), (2,), f"disk full at {size} bytes")
        for place in self.rng.sample(range(1, self.writes // 2), self.some):
            self.ended(Run(folder, cache, lambda p=place: at_write(p, full)).end(), (2,), f"disk full at write {place}")
        self.finish(folder, cache)

    def folder_twice(self) -> None:
        """Two runs in one folder: the second must be refused."""
        folder = self.folder()
        first = Run(folder, self.cache)
        while not (folder / "run.json").exists() and time.monotonic() - first.began < PATIENCE:
            time.sleep(0.005)
        code = self.ended(Run(folder, self.cache).end(), (2,), "a second run on one folder")
        self.check(code == 2, "a second run on one folder was not refused")
        self.check(self.ended(first.end(), (), "the first of two runs on one folder") == 0, "the first was disturbed")
        self.compare(folder)

    def cache_twice(self) -> None:
        """Two runs with one cache at the same time."""
        cache = self.work / "shared"
        for run in [Run(self.folder(), cache), Run(self.folder(), cache)]:
            self.ended(run.end(), (), "two runs on one cache")
            self.compare(run.folder)

    def signals(self) -> None:
        """Ctrl-C and SIGTERM at random moments, and a closed stdout pipe."""

        def way(folder: Path, how: signal.Signals) -> int:
            ended = Run(folder, self.cache).end(self.moment(), how)
            return self.ended(ended, (128 + how, -how), how.name)

        self.disturb([partial(way, how=how) for how in (signal.SIGINT, signal.SIGTERM)] * self.some)
        if self.count > 1:
            folder = self.folder()
            code, _, err = Run(folder, self.cache, nobody_reads).end()
            self.check(code in (0, 1, 2) and "Traceback" not in err, f"a stdout that nobody reads: {code}: {err}")
            self.finish(folder)

    def processes(self) -> None:
        """SIGKILL of one of two processes: the other must end with one line. Two processes round sums otherwise than one."""
        cache, folder = self.work / "two", self.folder()
        self.two(folder, cache)
        whole = left(folder)
        for who in [self.rng.randrange(2) for _ in range(self.some)]:
            folder = self.folder()
            self.two(folder, cache, who)
            self.two(folder, cache)
            self.compare(folder, whole)

    def two(self, folder: Path, cache: Path, killed: int | None = None) -> None:
        """Run two processes with torchrun's environment variables. Process `killed` is killed at a random moment."""
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        names = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        names |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        pair = [Run(folder, cache, names=names | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
        if killed is not None:
            code, _, err = pair.pop(killed).end(self.moment())
            self.check(code in (0, -signal.SIGKILL) and not err, f"{folder.name}: process {killed}: {code}: {err}")
            seen = time.monotonic() - pair[0].began
            self.ended(pair[0].end(seen + 5, signal.SIGTERM), (2, 130, -signal.SIGTERM), f"{folder.name}: the other")
            return
        for run in pair:
            code, _, err = run.end()
            self.check(code == 0 and not err, f"{folder.name}: two processes: {code}: {err}")


PARTS = {
    "kills": Torture.kills,
    "writes": Torture.writes_cut,
    "checkpoints": Torture.checkpoints,
    "disk": Torture.disk,
    "folder": Torture.folder_twice,
    "cache": Torture.cache_twice,
    "signals": Torture.signals,
    "processes": Torture.processes,
}
SHORT = [name for name in PARTS if name != "processes"]  # tests/test_distributed.py covers it


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", metavar="override", help="of train.py")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part; may be repeated")
    parser.add_argument("--short", action="store_true", help="one disturbance of a kind instead of seven to twenty")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # forking a process with threads is unsafe
    SETTINGS.extend(args.settings)
    with tempfile.TemporaryDirectory(prefix="torture-") as work:
        torture = Torture(Path(work), random.Random(args.seed), 1 if args.short else 20)
        for name in args.only or (SHORT if args.short else PARTS):
            began = time.monotonic()
            PARTS[name](torture)
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        torture.close()
    if torture.wrong:
        sys.exit(f"{len(torture.wrong)} wrong")
    print("all as undisturbed")


if __name__ == "__main__":
    main()
