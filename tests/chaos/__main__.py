"""The command itself: rounds of every kind on every place until time is over, and a table. See the package."""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from random import Random
from typing import get_args

from moeflow.sources import How
from tests.chaos import clusters
from tests.chaos.kinds import KINDS
from tests.chaos.places import NAMES, Absent, Place, opened
from tests.chaos.scene import Scene
from tests.chaos.tally import Round, sound, summary, table
from tests.chaos.truth import Truth, undisturbed


def main(words: Sequence[str] | None = None) -> int:
    asked = _arguments(words)
    os.environ |= {"OMP_NUM_THREADS": "1", "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    os.environ |= {"AWS_EC2_METADATA_DISABLED": "true", "DS_ACCELERATOR": "cpu", "RAY_USAGE_STATS_ENABLED": "0"}
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "RAY_ADDRESS", "AWS_CONFIG_FILE"):
        os.environ.pop(name, None)
    for stop in (signal.SIGINT, signal.SIGTERM):  # also of a program in the background: the table is told, and servers end
        signal.signal(stop, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=asked.folder))
    rounds: list[Round] = []
    began = time.monotonic()
    try:
        with ExitStack() as stack:
            stack.callback(clusters.heads.close)
            places = _places(asked.store, folder, stack)
            truths = [undisturbed(folder / how, how) for how in get_args(How)]
            say(f"chaos: an undisturbed run takes {truths[0].seconds:.1f} s; seed {asked.seed}, in {folder}")
            until = time.monotonic() + 60 * asked.minutes
            for kind, place, n in _turns(asked, places):
                if time.monotonic() > until:
                    break
                name = f"{asked.seed}/{kind}/{place.name}/{n}"
                rounds.append(_round(kind, place, Random(f"source {name}").choice(truths), name, folder))
    except KeyboardInterrupt:
        say("chaos: interrupted")
    print(json.dumps(summary(rounds) | {"seed": asked.seed}) if asked.json else table(rounds), flush=True)
    for one in rounds:
        for what in (*one.mismatches, *one.hangs, *one.wrong):
            say(f"{one.name}: {what}")
    injected = summary(rounds)["injected"]
    say(f"chaos: {len(rounds)} rounds in {(time.monotonic() - began) / 60:.1f} minutes, with {injected}")
    good = sound(rounds)
    if good:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if good else 1


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Hurt runs until time is over, and compare.")
    parser.add_argument("--minutes", type=float, default=60, help="(default: 60)")
    parser.add_argument("--rounds", type=int, default=0, help="at most so many of every kind on every store; 0: no bound")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="(default: the time)")
    parser.add_argument("--only", action="append", choices=[*KINDS], metavar="KIND", help=f"one of {', '.join(KINDS)}; may repeat")
    parser.add_argument("--store", action="append", choices=NAMES, metavar="STORE", help=f"one of {', '.join(NAMES)}; may repeat")
    parser.add_argument("--without-ray", action="store_true", help="only the kinds that need no Ray head")
    parser.add_argument("--folder", type=Path, help="where everything is kept; a short path, for Ray's sockets")
    parser.add_argument("--json", action="store_true", help="the counts as JSON instead of the table")
    return parser.parse_args(words)


def _places(names: Sequence[str] | None, folder: Path, stack: ExitStack) -> list[Place]:
    places = []
    for name in names or NAMES:
        try:
            places.append(stack.enter_context(opened(name, folder)))
        except Absent as why:
            say(f"chaos: {name} is left out: {why}")
    return places


def _turns(asked: argparse.Namespace, places: Sequence[Place]) -> Iterator[tuple[str, Place, int]]:
    """Every kind on every place that it means something on, again and again."""
    kinds = {name: KINDS[name] for name in asked.only or KINDS if not (asked.without_ray and KINDS[name].ray)}
    for n in range(asked.rounds) if asked.rounds else count():
        turns = [(name, place, n) for name, kind in kinds.items() for place in places if place.name in kind.stores]
        if not turns:
            return
        yield from turns


def _round(kind: str, place: Place, truth: Truth, name: str, folder: Path) -> Round:
    round_ = Round(kind, place.name, name)
    own = folder / name.replace("/", "-")
    own.mkdir()
    began = time.monotonic()
    try:
        KINDS[kind].play(Scene(place, truth, Random(name), round_, own, place.new(own.name), own / "cache"))
    except Absent as why:
        round_.absent = str(why)
    except Exception as error:  # the round itself failed, which must not pass for a sound one
        round_.wrong.append(f"the round failed: {error!r}; {traceback.format_exc(limit=-2).splitlines()[-2].strip()}")
    finally:
        if place.proxy is not None:
            place.proxy.reset()
    round_.seconds = time.monotonic() - began
    done = ", ".join(f"{n} {what}" for what, n in round_.injected.items())
    how = f"is left out: {round_.absent}" if round_.absent else f"in {round_.seconds:.1f} s: {done}; ended {dict(round_.ends)}"
    say(f"{'ok ' if round_.sound else 'BAD'} {name} {how}")
    for what in (*round_.mismatches, *round_.hangs, *round_.wrong):
        say(f"    {what}")
    if round_.sound:
        shutil.rmtree(own, ignore_errors=True)
        shutil.rmtree(folder / "stores" / own.name, ignore_errors=True)
    return round_


if __name__ == "__main__":
    sys.exit(main())
