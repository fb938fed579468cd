"""Which replica takes a call: the one it names, as edits of a prepared source must, or the less busy of two."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from ray.serve.request_router import RequestRouter

# Serve carries this module to its processes as a copy, so what the process is to know lies in another one.
from ddengine.serve.ray_workers import note, present

if TYPE_CHECKING:
    from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

PATH = f"{__name__}.HomeRouter"  # Serve imports it by name wherever there is a handle


class HomeRouter(RequestRouter):
    """Sends a call with the keyword `home` to the replica of that id for as long as there is one.

    Serve's own model multiplexing would do nearly this, but it tells routers with a second's delay where a model is,
    and falls back to other replicas when that one is busy. Both would turn away edits of sources that are there.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One rank of one or two replicas; of two the router takes the shorter queue."""
        home = None if pending_request is None else pending_request.kwargs.get("home")
        named = [replica for replica in candidate_replicas if replica.replica_id.unique_id == home]
        return [named or random.sample(candidate_replicas, min(2, len(candidate_replicas)))]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        note(self._deployment_id.name, [replica.replica_id.unique_id for replica in replicas])

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        name = self._deployment_id.name
        note(name, [one for one in present(name) if one != replica_id.unique_id])
