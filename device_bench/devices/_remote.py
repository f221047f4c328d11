"""A device behind a connection: every pass is a job for the C++ runner, which needs no Python there."""

import json
import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from device_bench.devices import _passes
from device_bench.devices._bundle import bundle, own_bundle
from device_bench.devices._claim import MARGIN_S, Claim
from device_bench.devices._link import Link, Lost, quote
from device_bench.devices._process import Interrupted, Process, Watch, kill_all
from device_bench.devices._requests import Asker, Request, Results, job_text, read_line
from device_bench.devices._sensors import Sensors
from device_bench.devices._watching import Watching
from device_bench.devices._workspace import SECONDS_PER_BYTE, Workspace
from device_bench.devices.base import Device, Progress
from device_bench.sensors.base import Absent
from device_bench.sensors.cpus import big_cluster, cpus, mask
from device_bench.telemetry import Identity
from device_bench.worker import FORBIDDEN
from vlm.errors import CheckFailed, UserError

Found = TypeVar("Found")
HURRIED_S = 5.0  # for which a broken connection is waited for where the user has interrupted
BREAKS = 25  # how often the connection may break in one pass
ABIS = {"aarch64": "arm64-v8a", "arm64-v8a": "arm64-v8a", "x86_64": "x86_64"}


class RemoteDevice(Device):
    """Runs passes with the runner of a push bundle, in one folder of the device."""

    settings = frozenset({"min_seconds", "sustained_s", "idle_s", "cool_s"})
    android = False

    def __init__(self, link: Link) -> None:
        self.link = link
        self.spec = link.spec
        self.emulated = False  # known once it was pushed to
        self._pushed: Path | None = None
        self._attempts = 0
        self._files: dict[str, Path] = {}

    @abstractmethod
    def root(self) -> str:
        """The folder on the device that is ours."""

    @abstractmethod
    def look(self) -> Identity:
        """Identify the device over a connection that works."""

    def identify(self) -> Identity:
        """Identify the device.

        Raises:
            UserError: it cannot be used now; the message tells which state it is in and the next step.
        """
        self.link.check()
        return self.again(self.look)

    @cached_property
    def workspace(self) -> Workspace:
        """Our folder."""
        return Workspace(self.link, self.root())

    @cached_property
    def claim(self) -> Claim:
        """The right to use the device."""
        return Claim(self.link, f"{self.root()}.lock")

    @cached_property
    def sensors(self) -> Sensors:
        """The device's sensors."""
        sensors = Sensors(self.android)
        sensors.locate(self.link)
        return sensors

    @cached_property
    def cluster(self) -> list[int] | Absent:
        """The processors that the runner is pinned to: the fast ones."""
        fast = big_cluster(cpus(self.link.run(self.sensors.script).out))
        if not isinstance(fast, Absent) and self.link.words("taskset", mask(fast), "true").code != 0:
            return Absent("no taskset on the device")
        return fast

    @property
    def prefix(self) -> list[str]:
        """Words that pin what follows them to the fast processors."""
        return [] if isinstance(self.cluster, Absent) else ["taskset", mask(self.cluster)]

    @cached_property
    def _scratch(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="pocketvlm-bench-"))

    def push(self, artifact: Path) -> Path:
        """Bring the runner and an artifact to the device; returns the artifact on this machine.

        Raises:
            UserError: another bench uses the device, it is full, or there is no runner for it.
        """
        asker = Asker(artifact)
        identity = self.identify()
        arch, self.emulated = identity.arch or "unknown", identity.kind == "emulated"
        if arch not in ABIS:
            raise UserError(f"--device {self.spec}: processor {arch!r} found; {', '.join(sorted(set(ABIS)))} expected.")
        engine = asker.manifest.engine
        self._bundle = own_bundle(engine) or bundle(engine, ABIS[arch])
        files = {f"bundle/{name}": path for name, path in self._bundle.files.items()}
        files |= {f"artifact/{file.path}": artifact / file.path for file in asker.manifest.files}
        self._files, fresh = files, self._pushed != artifact
        self._pushed = artifact
        size = sum(path.stat().st_size for path in files.values())
        self.again(lambda: self.claim.take(MARGIN_S + size * SECONDS_PER_BYTE))
        self.again(lambda: self._bring(fresh))
        return artifact

    def _bring(self, fresh: bool = False) -> None:
        """Bring bundle and artifact; `fresh` removes an earlier artifact first."""
        space = self.workspace
        space.own()
        kill_all(self.link, space.path("jobs"))  # what an interrupted measurement has left
        if fresh:
            self.link.words("rm", "-rf", *map(space.path, ("artifact", "jobs", "pictures")))
        space.push(self._files)

    def run(self, job: dict[str, Any], log: Path, timeout_s: float, on_progress: Progress) -> dict[str, Any]:
        """Run one pass in a fresh process of the runner."""
        whole = _passes.Job(**job, log=log, timeout_s=timeout_s)
        longest = MARGIN_S + timeout_s + whole.sustained_s + whole.idle_s + whole.cool_s

        def begin() -> dict[str, Any]:
            self.claim.take(longest)
            return _passes.PASSES[whole.kind](self, whole, on_progress)

        found = self.again(begin)
        imported = dict.fromkeys(FORBIDDEN, False)
        return {"engine": self._bundle.engine, "emulated": False, "imported": imported, **found}

    def again(self, work: Callable[[], Found]) -> Found:
        """Do some work on the device; where the connection breaks, wait for it and do the work again.

        Raises:
            UserError: the device does not come back, or breaks again and again.
        """
        for _ in range(BREAKS):
            if self.link.interrupted:
                raise KeyboardInterrupt
            try:
                return work()
            except Lost:
                self.link.wait()
        raise UserError(f"--device {self.spec}: the connection broke {BREAKS} times. Check the cable or the network.")

    def answer(self, job: "_passes.Job", settings: dict[str, Any], ask: list[Request], watch: Watching) -> Results:
        """Run the runner over some requests to the end, over breaks of the connection and restarts of the device.

        In the accuracy pass, what was answered before a break is not asked again.

        Raises:
            Lost: another pass was cut short; half a measurement is none, and after a restart the device is neither cool
                nor in the state that was recorded, so that all of the pass must begin anew.
            UserError: the device does not come back, or is full.
            CheckFailed: the runner failed or took too long; the message names the log.
        """
        results = Results()
        for _ in range(BREAKS):
            answered = {reply.id for reply in results.replies}
            left = [request for request in ask if request.id not in answered]
            if ask and not left:
                results.done = True
                return results
            try:
                self._run_once(job, settings, left, watch, results)
                return results
            except Lost:
                self.link.wait()
            except Interrupted:
                self.again(self._bring)  # a restart may have taken files away too
            if job.kind != "accuracy":
                raise Lost(f"the {job.kind} pass was cut short")
        raise UserError(f"--device {self.spec}: the connection broke {BREAKS} times. Check the cable or the network.")

    def _run_once(
        self,
        job: "_passes.Job",
        settings: dict[str, Any],
        left: list[Request],
        watch: Watching,
        results: Results,
    ) -> None:
        what = f"{job.artifact.name}: the {job.kind} pass"
        space, bundle = self.workspace, self._bundle
        full = {"model": space.path("artifact", *bundle.model), "threads": job.threads, **settings}
        # A folder of its own for each attempt: one that a broken connection left half-started must not come between.
        self._attempts += 1
        name = f"jobs/{self._attempts}"
        space.write(f"{name}/job.txt", job_text(full, left), self._scratch / "job.txt")
        pictures = sorted({request.picture for request in left} - {"-"})
        space.push({f"pictures/{picture}": self._scratch / picture for picture in pictures})
        folder = space.path(name)
        kill_all(self.link, space.path("jobs"))
        command = [*watch.prefix, *bundle.command(space.path("bundle")), folder]
        process = Process(self.link, folder, command, job.timeout_s, self.orphaned())

        def on_line(line: str) -> None:
            read_line(results, line)
            watch.on_results(results)

        ended = process.follow(Watch(watch.script, watch.interval_s, on_line, watch.on_reading))
        process.kill()
        with job.log.open("a") as log:
            log.write(self.link.run(f"cat {folder}/out {folder}/err {folder}/leader 2>/dev/null").out)
        if ended.late:
            raise CheckFailed(
                f"{what} took longer than {job.timeout_s:g} s and was killed. Raise timeout_s or see {job.log}."
            )
        if results.failed is not None or ended.code != 0 or not results.done:
            raise CheckFailed(f"{what} {_ending(ended.code, results.failed)} Its output: {job.log}")

    def pull(self, name: str, to: Path) -> None:
        """Move a file that a pass left on this machine; nothing happens when it did not get to write it."""
        if (self._scratch / name).is_file():
            shutil.move(self._scratch / name, to)

    def orphaned(self) -> str:
        """The script that the device runs by itself, once no bench comes back to clean up."""
        return f"rm -rf {quote(self.workspace.root, self.claim.file)}"

    def begin_timing(self) -> bool:
        """Change what the device's system offers for steady measurements; returns whether it did."""
        return False

    def end_timing(self) -> None:
        """Restore what `begin_timing` changed; called again when all is over, in case the connection broke."""

    def save(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Keep rows as JSON lines for `pull`."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (self._scratch / name).write_text(text)

    @property
    def scratch(self) -> Path:
        """A folder on this machine for what goes to the device."""
        return self._scratch

    def interrupt(self) -> None:
        """Let whatever waits for the device end."""
        self.link.interrupted = True

    def clean_up(self) -> None:
        """Kill what still runs on the device, remove our folder there and the one here."""
        if self.link.interrupted:
            self.link.interrupted, self.link.patience_s = False, HURRIED_S
        try:
            if "claim" in vars(self) and self.link.gone:
                with suppress(Lost):  # it was waited for long enough
                    self._clean_device()
            elif "claim" in vars(self):
                self.again(self._clean_device)
        finally:
            if "_scratch" in vars(self):
                shutil.rmtree(self.__dict__.pop("_scratch"), ignore_errors=True)

    def _clean_device(self) -> None:
        if not self.claim.is_ours():
            return  # what runs there now is another bench's
        self.end_timing()
        if not self.workspace.is_somebodys():
            jobs = self.workspace.path("jobs")
            kill_all(self.link, jobs)
            self.workspace.remove()
            kill_all(self.link, jobs)  # what a broken connection started late, now without a folder
        self.claim.release()


def _ending(code: int | None, failed: str | None) -> str:
    if failed is not None:
        return f"failed: {failed}"
    if code is None or code > 128:
        name = "a signal" if code is None else f"signal {code - 128}"
        return f"was killed by {name}" + (" (most often: out of memory)." if code in (None, 137) else ".")
    return f"ended with exit code {code}."
