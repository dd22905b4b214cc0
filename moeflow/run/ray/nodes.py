"""What a Ray cluster's nodes offer and hold: which has a step's inputs, and whether any can run the step."""

import math
import sys
from collections import Counter
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moeflow.run.call import Call
from moeflow.run.words import size
from moeflow.step import Step
from moeflow.store import LocalBlobs, Store
from moeflow.store.names import split_part


class Nodes:
    """Remembers which node made or read what, so that a stage's layers are downloaded to few nodes."""

    def __init__(self, store: Store, sizes: dict[str, int]) -> None:
        """`sizes`: bytes of stored artifacts, by key."""
        # A store on a shared disk is equally near to all nodes.
        self._matters = not isinstance(store.blobs, LocalBlobs)
        self._sizes = dict(sizes)
        self._holders: dict[str, str] = {}  # input name -> node that has it in its cache

    def holds(self, call: Call, node: str, made: int) -> None:
        """Record that `node` ran `call`, which stored `made` bytes."""
        self._sizes[call.key] = made
        for i in call.record.inputs:
            self._holders[i.key] = node

    def near(self, call: Call) -> NodeAffinitySchedulingStrategy | str:
        """Where to run `call`: on the node that has most bytes of its inputs, or elsewhere if that is busy."""
        votes: Counter[str] = Counter()
        for i in call.record.inputs if self._matters else ():
            if node := self._holders.get(i.key):
                votes[node] += self._sizes.get(split_part(i.key)[0], 0) + 1
        if not votes:
            return "DEFAULT"
        return NodeAffinitySchedulingStrategy(votes.most_common(1)[0][0], soft=True, _spill_on_unavailable=True)


def demand(step: Step, *, gpus: bool = True, most: float = math.inf) -> dict[str, float]:
    """What a step, or each process of a gang, asks of a node, by Ray's names; without `gpus` it uses only CPUs.

    `most`: bytes of the largest node's memory; a step that does with less never asks for more, and so never waits in vain.
    """
    memory = step.resources.memory or step.spec.memory
    asked = {
        "CPU": step.resources.cpus,
        "GPU": step.resources.gpus if gpus else 0,
        "memory": min(memory, most) if step.spec.optional else memory,
    }
    return {name: value for name, value in asked.items() if value}


def offers() -> list[dict[str, float]]:
    """The resources of each node that is up, by Ray's names."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def largest(offers: list[dict[str, float]]) -> float:
    """The bytes of memory of the largest node."""
    return max((offer.get("memory", 0) for offer in offers), default=0)


def too_large(step: Step, offers: list[dict[str, float]], *, gpus: bool = True) -> str:
    """Why these nodes cannot run the step, or all of a gang's processes at once; empty if they can."""
    asked, processes = demand(step, gpus=gpus, most=largest(offers)), step.resources.processes
    room = sum(_fits(asked, offer) for offer in offers)
    if room >= max(processes, 1):
        return ""
    if room:
        return f"{step.name} is a gang of {processes:,} processes of {_said(asked)} each, and the nodes have room for {room:,}"
    best = {name: max((offer.get(name, 0) for offer in offers), default=0) for name in asked}
    each = " for each process" if processes else ""
    return f"{step.name} asks for {_said(asked)}{each}, and no node has it (at most {_said(best)})"


def _fits(asked: dict[str, float], offer: dict[str, float]) -> int:
    """How many times one empty node has what is asked; a large number if nothing is asked."""
    return min((int(offer.get(name, 0) / value + 1e-9) for name, value in asked.items()), default=sys.maxsize)


def free_orphans() -> None:
    """Release the resources of this driver's gangs whose controller died: Ray would keep them until the driver ends."""
    # here, because they are Ray's internals: if another version moved them, only gangs should fail
    from ray import ActorID
    from ray._private.state import state
    from ray.core.generated import gcs_pb2
    from ray.util.placement_group import PlacementGroup, PlacementGroupID, remove_placement_group

    job = ray.get_runtime_context().get_job_id()
    table: Any = gcs_pb2.PlacementGroupTableData  # type: ignore[attr-defined]
    for data in state._connect_and_get_accessor().get_placement_group_table():  # the public table lacks the creator
        group = table.FromString(data)
        ours = group.creator_job_id.hex() == job and not ActorID(group.creator_actor_id).is_nil()
        if ours and group.creator_actor_dead and group.state != table.REMOVED:
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))


def _said(amounts: dict[str, float]) -> str:
    words = {"CPU": "{:g} CPUs", "GPU": "{:g} GPUs"}
    return ", ".join(f"{size(v)} of memory" if k == "memory" else words[k].format(v) for k, v in amounts.items())
