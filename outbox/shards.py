"""The shards that each relay leads: session locks in Postgres, shared out equally."""

import math
from collections.abc import Sequence

from beatless.outbox.doorbell import Sessions
from beatless.outbox.message import SHARDS
from beatless.outbox.observer import Observer, ShardsAssigned
from beatless.outbox.statements import statements


class Shards:
    """The shards that one relay leads, and its watch over the next relay."""

    def __init__(self, sessions: Sessions, observer: Observer) -> None:
        self.owned: tuple[int, ...] = ()
        self.members: Sequence[int] = ()
        """The backend pids of all relays when the shards were last shared."""
        self.origin = ""
        """The history of this schema, see the fragment `origin`; of the last look at the locks."""
        self.complete = True
        """Whether each shard had a leader at the last look at the locks."""
        self._sessions = sessions
        self._sql = statements(__file__, sessions.queries.schema)
        self._observer = observer

    def rebalance(self) -> None:
        """Lead an equal share of the shards, and watch the next relay in the ring for its death."""
        sessions = self._sessions
        sessions.watch_shard(None)
        changed = sessions.watch_granted  # a relay died: the others must count anew as well
        sessions.members_changed = sessions.watch_granted = False
        leaders, members = self._leaders()
        # So they must if a relay went unwatched, and its free shards are not for us.
        changed |= not set(self.members) <= set(members)
        self.members = members
        share = math.ceil(SHARDS / max(1, len(members)))
        changed |= self._take_share(share, leaders)
        if changed:
            sessions.announce()
        self._observer(ShardsAssigned(shards=self.owned))
        self.watch_next()

    def all_led(self) -> bool:
        """Whether each shard has a leader."""
        self._leaders()
        return self.complete

    def _take_share(self, share: int, leaders: dict[int, int]) -> bool:
        """Release shards above the share, or take free ones up to it; whether any moved."""
        sessions = self._sessions
        changed = False
        mine = sorted(shard for shard, pid in leaders.items() if pid == sessions.pid)
        for shard in mine[share:]:
            sessions.work.execute(self._sql["give_back"], {"shard": shard})
            changed = True
        mine = mine[:share]
        for shard in (s for s in range(SHARDS) if s not in leaders):
            if len(mine) >= share:
                break
            row = sessions.work.execute(self._sql["lead"], {"shard": shard}).fetchone()
            if row and row[0]:
                mine.append(shard)
                changed = True
        self.owned = tuple(sorted(mine))
        return changed

    def watch_next(self) -> None:
        """Await a lock of the next relay in the ring of backend pids."""
        sessions, members, me = self._sessions, self.members, self._sessions.pid
        share = math.ceil(SHARDS / max(1, len(members)))
        ring = [pid for pid in members if pid > me] + [pid for pid in members if pid < me]
        leaders, still = self._leaders()
        # Unwatched: a relay that went since the count, or released a shard that was not free then.
        freed = len(self.owned) < share and len(leaders) < SHARDS
        if still != members or freed:
            sessions.members_changed = True
        theirs = [(ring.index(pid), shard) for shard, pid in leaders.items() if pid in ring]
        # Granted to the waiting session of a relay that has gone: free again in a moment, and
        # only ours to notice.
        strays = [(-1, shard) for shard, pid in leaders.items() if pid not in still]
        waited_for = min(strays + theirs, default=None)
        sessions.watch_shard(waited_for[1] if waited_for else None)

    def _leaders(self) -> tuple[dict[int, int], list[int]]:
        """The session that leads each shard, and the sessions of all relays."""
        rows = self._sessions.work.execute(self._sql["leaders"]).fetchall()
        if rows:  # a renewed history is noticed by the way
            self.origin = rows[0][2]
        leaders = {shard: pid for shard, pid, _ in rows if shard < SHARDS}
        members = sorted({pid for shard, pid, _ in rows if shard >= SHARDS})
        self.complete = len(leaders) == SHARDS
        return leaders, members
