"""The main job on Ray Data: an actor pool does the units of one store, each claimed as by any other job."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dove_fast import native
from dove_fast.errors import DoveError, StoreError
from dove_fast.failures import JobError
from dove_fast.jobs.loading import LoadedModel, load_model
from dove_fast.jobs.progress import OnProgress, Progress
from dove_fast.jobs.queries import Ids
from dove_fast.jobs.ray_cluster import connected, import_ray, overridden, quiet
from dove_fast.jobs.tokenize import RESUME, TokenizeJob, TokenizeOptions, TokenizeReport
from dove_fast.memory import keep_freed_memory
from dove_fast.ops.registry import ENVIRONMENT

__all__ = ["tokenize_with_ray"]

# How often a unit is begun again after its actor died. Ray would do it for ever, also where the unit is the reason.
RETRIES = 4
# Of Ray Data, where its version has them: a unit may take any time.
CONTEXT = {"enable_progress_bars": False, "execution_no_progress_timeout_s": -1}


# What the driver raises for an actor that stopped: the store will not have the unit; the same call goes on; a bug.
FAILURES: dict[str, type[Exception]] = {"refused": StoreError, "stopped": JobError, "bug": RuntimeError}


def tokenize_with_ray(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | None,
    options: TokenizeOptions | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    queries: Mapping[str, Ids | str] | None = None,
    address: str | None = None,
    processes: int | None = None,
    gpus_each: float = 0,
    on_progress: OnProgress | None = None,
) -> TokenizeReport:
    """Do what `tokenize` does in `processes` Ray actors, each with its own model; the shards have the same bytes.

    `checkpoint` and `dtype` are those of `load_model`. `address` is what `ray.init` takes to connect to a cluster,
    "auto" or "host:port", but not "ray://", which does not carry Ray Data. All its nodes must see `source`, `output`
    and `checkpoint` under the same paths, on a file system with locks, and must have this package. None uses the Ray
    that this process is connected to, or else starts one here, without a dashboard and without reports to its makers,
    and ends it.

    `processes` None: as many as Ray has room for, each with this process's number of torch threads, or with `gpus_each`
    GPUs. Given, so many are asked for; those that Ray has no room for wait. `gpus_each`: of each actor, may be a share
    of one; 0 computes on the CPU. `device` is "cpu" or "cuda", None for what `gpus_each` says: Ray numbers the GPUs.
    Decoding happens in the actors themselves unless `options.workers` says otherwise.

    An actor that dies leaves its unit free, and Ray gives the unit to its successor, `RETRIES` times. `on_progress`
    sees how far it is whenever a unit is done.

    Raises `ImportError` without Ray, `ValueError` for options that do not go together, `ConnectionError` where no
    cluster answers, and what `tokenize` raises; `JobError` too when Ray gives up. Whenever it stops, the same call, or
    `tokenize`, goes on where it was.
    """
    ray = import_ray()
    start = time.perf_counter()
    options = replace(options or TokenizeOptions(), join=True)
    kind = _check(options, device, processes, gpus_each)
    source = os.fspath(source)
    # Nothing is computed here: the device stands in the manifest only, and decides which backends are refused.
    loaded = load_model(checkpoint, device=kind if torch.cuda.is_available() else "cpu", dtype=dtype)
    tally = _Tally(on_progress)
    job = TokenizeJob(source, output, loaded, replace(options, workers=0), queries=queries, on_progress=tally.restart)
    loaded.model.to("cpu")
    task = _Task(
        source=source,
        output=os.path.abspath(output),
        checkpoint=_located(checkpoint),
        options=replace(options, workers=options.workers or 0),
        device=kind,
        dtype=dtype,
        queries=queries,
        folder=os.getcwd(),
        threads=torch.get_num_threads(),
        backend=os.environ.get(ENVIRONMENT),
        retries=RETRIES,
    )
    with contextlib.closing(job), contextlib.ExitStack() as stack:
        if job.missing:
            # Before anything is written.
            stack.enter_context(connected(ray, address, processes))
        # Takes over what is done, and finishes the store where nothing is missing.
        job.conclude()
        before = None
        # Again, as long as there was something: another job may have died and left its unit.
        while (units := job.missing) and len(units) != before:
            before = len(units)
            pool = _Pool.on(ray, processes, task.threads, gpus_each)
            with contextlib.closing(_rows(ray, task, units, pool)) as rows:
                for row in rows:
                    tally.add(row)
            job.conclude()
        report = job.report()
    if report.already_complete:
        return report
    return replace(report, computed=tally.images, seconds=time.perf_counter() - start, stages={})


def _check(options: TokenizeOptions, device: str | torch.device | None, processes: int | None, gpus_each: float) -> str:
    """Return the kind of device that the actors compute on, "cpu" or "cuda"."""
    if options.world_size > 1:
        raise ValueError("rank and world_size are for jobs that share units by number; Ray shares them itself")
    if processes is not None and processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    if gpus_each < 0:
        raise ValueError(f"gpus_each must be at least 0, got {gpus_each}")
    kind = "cuda" if gpus_each else "cpu"
    if device is not None and str(device) != kind:
        raise ValueError(
            f"device must be {kind!r} or None with gpus_each={gpus_each}, got {str(device)!r}; Ray numbers the GPUs"
        )
    return kind


def _located(checkpoint: str | os.PathLike[str] | None) -> str | None:
    """Return a checkpoint such that it is found from any folder; a name of a shipped one stays as it is."""
    if checkpoint is None or (isinstance(checkpoint, str) and not os.path.exists(checkpoint)):
        return checkpoint
    return os.path.abspath(checkpoint)


@dataclass(frozen=True)
class _Task:
    """What an actor is told: the arguments of `tokenize_with_ray`, and where and how the driver would do it itself.

    `source` is as it was given, because records name their files by it: it counts from `folder`.
    """

    source: str
    output: str
    checkpoint: str | None
    options: TokenizeOptions
    device: str
    dtype: str | None
    # Ray makes a name of the rest, for which millions of queries would be too long.
    queries: Mapping[str, Ids | str] | None = field(hash=False, repr=False)
    folder: str
    threads: int
    backend: str | None
    retries: int


@dataclass(frozen=True)
class _Row:
    """What came of a unit: `done`, by whomever; what this actor did; a key of `FAILURES` if it stopped, and why."""

    unit: int
    done: bool
    images: int
    tokens: int
    errors: int
    failure: str = ""
    why: str = ""


class _Attempts:
    """An actor that counts how often each unit was begun."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def begin(self, unit: int) -> int:
        """Count a unit that is begun, and return how often it was before."""
        self._counts[unit] += 1
        return self._counts[unit] - 1


class _Units:
    """An actor, in a process of its own: loads the model and joins the store at its first unit, and keeps both.

    `attempts` is the handle of an `_Attempts`.
    """

    def __init__(self, task: _Task, attempts: Any) -> None:
        self._task = task
        self._attempts = attempts
        self._job: TokenizeJob | None = None
        self._counts = (0, 0, 0)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Do the one unit whose number is in the batch; returns the fields of a `_Row`, each a list of one."""
        (unit,) = batch["item"].tolist()
        # In the thread that computes: with another number of threads, results round.
        torch.set_num_threads(self._task.threads)
        before, done, failure, why = self._counts, False, "", ""
        try:
            self._check_attempts(unit)
            if self._job is None:
                self._job = self._open()
            self._job.run([unit])
            done = self._job.is_done(unit)
        except StoreError as error:
            failure, why = "refused", str(error)
        except JobError as error:
            failure, why = "stopped", str(error)
        except (DoveError, OSError, ValueError, ImportError) as error:
            failure, why = "stopped", f"{type(error).__name__}: {error}"
        except Exception:
            failure, why = "bug", f"a Ray actor failed: {traceback.format_exc()}"
        images, tokens, errors = (now - then for now, then in zip(self._counts, before, strict=True))
        row = _Row(unit, done, images, tokens, errors, failure, why)
        return {name: [value] for name, value in vars(row).items()}

    def _check_attempts(self, unit: int) -> None:
        import ray

        attempts = ray.get(self._attempts.begin.remote(unit))
        if attempts > self._task.retries:
            raise JobError(
                f"the process that did unit {unit} died {attempts} times, perhaps for want of memory; fewer processes "
                f"or a smaller batch need less; {RESUME}"
            )

    def _open(self) -> TokenizeJob:
        task = self._task
        if task.backend is not None:
            os.environ[ENVIRONMENT] = task.backend
        # A node without the folder needs none of it where all paths are absolute, and says what is missing elsewhere.
        with contextlib.suppress(OSError):
            os.chdir(task.folder)
        loaded = self._load()
        return TokenizeJob(
            task.source, task.output, loaded, task.options, queries=task.queries, on_progress=self._count
        )

    def _load(self) -> LoadedModel:
        loaded = load_model(self._task.checkpoint, device=self._task.device, dtype=self._task.dtype)
        if self._task.device == "cpu" and native.why_no_native() is None:
            # The process is this actor's alone, and goes through the same sizes batch after batch.
            keep_freed_memory()
        return loaded

    def _count(self, progress: Progress) -> None:
        self._counts = (progress.images, progress.tokens, progress.errors)


@dataclass(frozen=True)
class _Pool:
    """How many actors, and what each takes of its node."""

    size: int
    cpus_each: int
    gpus_each: float

    @classmethod
    def on(cls, ray: Any, processes: int | None, threads: int, gpus_each: float) -> _Pool:
        """Fit actors of `threads` threads or `gpus_each` GPUs to the nodes; `processes` None: fill them."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if gpus_each:
            return cls(processes or max(1, sum(int(node.get("GPU", 0) / gpus_each) for node in nodes)), 1, gpus_each)
        cpus = [int(node.get("CPU", 0)) for node in nodes]
        if processes is None:
            cpus_each = max(1, min(threads, max(cpus)))
            return cls(max(1, sum(number // cpus_each for number in cpus)), cpus_each, 0)
        fitting = (each for each in range(threads, 1, -1) if sum(number // each for number in cpus) >= processes)
        return cls(processes, next(fitting, 1), 0)


class _Tally:
    """Adds up what the actors did, onto what the store held before."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self._on_progress = on_progress
        self._progress: Progress | None = None
        self.images = self._tokens = 0

    def restart(self, progress: Progress) -> None:
        """Take over what the store holds, once the job has looked there."""
        if self._progress is not None and progress.units_done < self._progress.units_done:
            return
        self._show(replace(progress, images=self.images, tokens=self._tokens, stage_seconds={}))

    def add(self, row: _Row) -> None:
        """Add what came of a unit. Raises the exception of a failure."""
        if row.failure:
            raise FAILURES[row.failure](_resumable(row.why) if row.failure == "stopped" else row.why)
        self.images += row.images
        self._tokens += row.tokens
        if self._progress is not None:
            self._show(
                replace(
                    self._progress,
                    done=self._progress.done + row.images + row.errors,
                    images=self.images,
                    tokens=self._tokens,
                    units_done=self._progress.units_done + row.done,
                )
            )

    def _show(self, progress: Progress) -> None:
        self._progress = progress
        if self._on_progress is not None:
            self._on_progress(progress)


def _rows(ray: Any, task: _Task, units: Sequence[int], pool: _Pool) -> Generator[_Row, None, None]:
    """Have the actors do units, and yield what came of each, in the order in which they are done.

    Raises `JobError` when Ray gives up. The actors end with the generator.
    """
    attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Attempts).remote()
    with quiet(), overridden(ray.data.DataContext.get_current(), CONTEXT):
        # Ray Data starts an actor that died again, and gives it the unit that it had.
        done = ray.data.from_items(list(units), override_num_blocks=len(units)).map_batches(
            _Units,
            batch_size=1,
            batch_format="numpy",
            fn_constructor_args=(task, attempts),
            # One at a time: a unit that waits behind another one could be with an actor that has none.
            compute=ray.data.ActorPoolStrategy(size=min(pool.size, len(units)), max_tasks_in_flight_per_actor=1),
            num_cpus=pool.cpus_each,
            num_gpus=pool.gpus_each,
        )
        try:
            # Nothing fetched ahead: a row is seen when it is there, not when the next one is.
            for batch in done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                yield from (_Row(**row) for row in batch.to_pylist())
        except ray.exceptions.RayError as error:
            # What an actor itself can tell comes in its row.
            first = next(filter(None, str(getattr(error, "cause", None) or error).splitlines()), "")
            raise JobError(_resumable(f"Ray gave up ({type(error).__name__}): {first}")) from error


def _resumable(sentence: str) -> str:
    return sentence if RESUME in sentence else f"{sentence}; {RESUME}"
