"""How long a planned run would take and what it would cost, as `plan` shows it."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moeflow.run.durations import Durations, finished
from moeflow.run.node_kinds import NodeKinds
from moeflow.run.plan import Plan
from moeflow.run.simulate import Simulation, simulate
from moeflow.run.words import count, span
from moeflow.step import Step, upstream
from moeflow.store import Index, Store

SHOWN = 3
"""So many names of steps are shown of the longest chain."""


def forecast(targets: Sequence[Step], store: Store, plan: Plan, nodes: NodeKinds, index: Index) -> Simulation | None:
    """Simulate the planned run on these nodes, with durations by what finished steps of the store took.

    None if nothing is to run, a step has no room, or the kind of the nodes' GPUs is not known. Requests: some manifests.
    """
    running = {row.key for row in plan.rows if row.state == "run"}
    if not running or nodes.unknown:
        return None
    durations = Durations(finished(upstream(targets), store, index))
    return simulate(targets, store, plan, nodes, durations, index=index)


def forecast_json(simulated: Simulation) -> dict[str, Any]:
    return asdict(simulated) | {"utilisation": simulated.utilisation}


def told(simulated: Simulation | None, plan: Plan, nodes: NodeKinds) -> list[str]:
    """What a plan says of the simulated run, or why it was not simulated; nothing where nothing would run, or cannot."""
    if simulated:
        return forecast_lines(simulated, nodes)
    if nodes.unknown:
        return [nodes.unknown]
    stuck = not plan.problems and any(row.state == "run" for row in plan.rows)
    return [f"not simulated: {nodes.file} has never so many nodes at once that each step finds room; raise max_workers"] * stuck


def forecast_lines(simulated: Simulation, nodes: NodeKinds) -> list[str]:
    """What the simulated run took, its longest chain, and what is known of gangs; a line each."""
    unit, devices = ("GPU", simulated.gpus) if simulated.gpus else ("CPU", simulated.cpus)
    there = "" if nodes.serial else " of " + ", ".join(f"{n} {name}" for name, n in simulated.nodes)
    price = "" if simulated.dollars is None else f", {simulated.dollars:,.2f} dollars"
    lines = [
        f"simulated on {nodes.file}: {span(simulated.seconds)} on {devices:g} {unit}{'s' * (devices != 1)}{there}; "
        f"{simulated.held / 3600:,.2f} {unit} hours, of which steps use {simulated.utilisation:.0%}{price}"
    ]
    if nodes.serial:
        lines = [f"simulated here, one step after another: {span(simulated.seconds)}"]
    chain = simulated.chain
    parts = ", ".join(f"{name} {span(seconds)}" for name, seconds in chain.parts[:SHOWN])
    lines.append(f"longest chain: {span(chain.seconds)} in {count(len(chain.names), 'step')}: {parts}")
    for label, seconds in simulated.gangs.items():
        lost = simulated.lost.get(label, 0.0)
        again = f"; a process that is lost costs {span(lost)} at most, and its restart" if lost else ""
        lines.append(f"{label}: {span(seconds)}{again}")
    told = f"{simulated.known:,} of {count(simulated.steps, 'duration')} by what finished steps took"
    lines.append(f"{told}, the others by operations, bytes and data sheets (docs/decisions/20-simulated-schedules.md)")
    return lines
