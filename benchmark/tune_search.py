"""The search for one row: compile the candidates in parallel, time what is left, in steps that a
state file keeps, so that a second run goes on where the first was stopped."""

import importlib.util
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import NamedTuple

import timing
import torch
from candidates import Candidate, Target
from kernels import Inputs, draw
from launch_search import Compiled, compile_ahead, launch, run_apart, tflops, timed
from tune_state import Case, State, ranked

from ring_flash_attn.core.attention import Attention

GROUP = 6  # candidates timed together with the row, and lost if that is interrupted
FINALISTS = 3
PLAIN_S = 5.0  # between lines of progress where there is no tqdm


class Options(NamedTuple):
    """How to search.

    Attributes:
        rounds, calls: timed, of a candidate and case. The best are timed twice as often.
        compile_s: seconds that one configuration may take to compile and run once.
        deadline: of time.monotonic(), after which nothing is started.
        on_gpu: whether candidates are run, not only compiled.
        command: runs a candidate once when its kernel, head dim and text are added.
    """

    rounds: int
    calls: int
    compile_s: float
    deadline: float
    on_gpu: bool
    command: list[str]

    @property
    def over(self) -> bool:
        return time.monotonic() > self.deadline


def search(
    of: Target, found: list[Candidate], cases: list[Case], state: State, options: Options
) -> bool:
    """Compile and time the candidates that the state does not know; return whether all are done."""
    whole = compile_candidates(of, found, cases, state, options)
    good = _good(of, found, state)
    for case in cases:
        whole = _time(of, good, case, state, options, final=False) and whole
        good = _good(of, good, state)
    tried = {x.text: x for x in found}
    leaders = [x.candidate for x in ranked(state, of, cases, final=False) if x.gain > 1]
    best = [tried[x] for x in leaders if x in tried][:FINALISTS]
    for case in cases:
        whole = _time(of, best, case, state, options, final=True) and whole
    return whole


def compile_candidates(
    of: Target, found: list[Candidate], cases: list[Case], state: State, options: Options
) -> bool:
    """Compile what has not been, and run once what has not been timed; return whether all are."""
    said = state.compiled(of)
    if of.row.text not in said:
        row = compile_ahead(of, of.row, options.compile_s)
        state.add(**_key(of, of.row), **row._asdict())
        said[of.row.text] = row
    row, out = said[of.row.text], state.dropped(of)

    def prepare(candidate: Candidate) -> tuple[Candidate, Compiled, str]:
        known = said.get(candidate.text) or compile_ahead(of, candidate, options.compile_s)
        if known.against(row) or not options.on_gpu:
            return candidate, known, ""
        words = ["--kernels", of.kernel, "--head-dims", str(of.head_dim), "--config"]
        return (
            candidate,
            known,
            run_apart([*options.command, *words, candidate.text], options.compile_s),
        )

    def pending(candidate: Candidate) -> bool:
        if candidate == of.row or candidate.text in out:
            return False
        known = said.get(candidate.text)
        if known is None:
            return True
        timed_in = [candidate.text in state.timed(of, case) for case in cases]
        return options.on_gpu and not known.against(row) and not all(timed_in)

    wanted = [x for x in found if pending(x)]
    if options.over:
        return not wanted
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1)) as pool:
        futures = [pool.submit(prepare, x) for x in wanted]
        try:
            for future in shown(futures, f"{of.name}: compile"):
                candidate, known, failure = future.result()
                if candidate.text not in said:
                    state.add(**_key(of, candidate), **known._asdict())
                if failure:
                    state.add(**_key(of, candidate), **_beside(of, "", False), dropped=failure)
                if options.over:
                    break
        finally:
            pool.shutdown(cancel_futures=True)
    return not any(future.cancelled() for future in futures)


def run_once(of: Target, candidate: Candidate, cases: list[Case]) -> None:
    """Run a candidate in every case; whatever is wrong with it is raised."""
    for case in cases:
        launch(candidate, _draw(of, case), case.folds).once()
        torch.cuda.synchronize()


def shown(futures: list[Future], title: str) -> Iterator[Future]:
    """Yield futures as they end and show how many have."""
    ended, total = as_completed(futures), len(futures)
    if importlib.util.find_spec("tqdm"):
        from tqdm import tqdm

        yield from tqdm(ended, title, total)
        return
    begin = last = time.monotonic()
    for number, future in enumerate(ended, 1):
        now = time.monotonic()
        if number == total or now - last > PLAIN_S:
            print(f"{title} {number}/{total}, {now - begin:.0f} s", flush=True)
            last = now
        yield future


def attention_of(case: Case, head_dim: int) -> Attention:
    """Return the mask of a case."""
    kind, _, left = case.mask.partition(" ")
    window = (int(left), 0) if kind == "window" else (-1, -1)
    return Attention(head_dim**-0.5, kind != "full", window)


def _time(
    of: Target, good: list[Candidate], case: Case, state: State, options: Options, final: bool
) -> bool:
    """Time what is not in the state beside the row, a group at a time; return whether all is."""
    known = state.timed(of, case, final)
    wanted = [x for x in good if x.text not in known]
    if not wanted:
        return True
    inputs, flush = _draw(of, case), timing.flush_buffer()
    rounds, begin = options.rounds * (1 + final), time.monotonic()
    for first in range(0, len(wanted), GROUP):
        if options.over:
            return False
        group = wanted[first : first + GROUP]
        times, dropped = timed(of.row, group, inputs, case.folds, rounds, options.calls, flush)
        row = times[of.row]
        for candidate in group:
            record = {**_key(of, candidate), **_beside(of, str(case), final)}
            if candidate in dropped:
                state.add(**record, dropped=dropped[candidate])
                print(f"  dropped {candidate.text}: {dropped[candidate]}")
                continue
            ms = times[candidate]
            speed = tflops(of.kernel, inputs, ms.p50)
            state.add(**record, ms=ms, row_ms=row, tflops=round(speed, 1))
        done = first + len(group)
        took = time.monotonic() - begin
        words = f"{of.name} {case}: {'finals' if final else 'timed'} {done}/{len(wanted)}"
        print(f"{words}, {took:.0f} s, row {tflops(of.kernel, inputs, row.p50):.1f}", flush=True)
        torch.cuda.empty_cache()
    return True


def _good(of: Target, found: list[Candidate], state: State) -> list[Candidate]:
    """Return the candidates beside the row that compiled and are not out."""
    said, out = state.compiled(of), state.dropped(of)
    row = said[of.row.text]
    return [
        x
        for x in found
        if x != of.row and x.text in said and x.text not in out and not said[x.text].against(row)
    ]


def _draw(of: Target, case: Case) -> Inputs:
    batch, length, heads = case.shape.split(",")
    query, _, key = heads.partition("/")
    sizes = int(batch), int(length), int(query), int(key or query), of.head_dim
    return draw(*sizes, torch.bfloat16, attention_of(case, of.head_dim))


def _key(of: Target, candidate: Candidate) -> dict:
    return {"kernel": of.kernel, "head_dim": of.head_dim, "candidate": candidate.text}


def _beside(of: Target, case: str, final: bool) -> dict:
    return {"row": of.row.text, "case": case, "final": final}
