/* In which order a zeo server says things: a model for Spin (https://spinroot.com).

The bug that matters is stale data taken for current: a load reads revision T0 of an object, T1 commits
and is announced, and then the load's reply comes: the client forgets the object, and caches T0 for ever.
What keeps this from happening, and what this model checks within small bounds, exhaustively:

    Everything said to one client goes through its outbox (zeo.server.outbox), a queue that counts
    what it announces (`published`) and knows the last tid it has shown (`announced`).
    A load takes the count as its mark, reads the storage holding no lock, and may enter its reply only
    if nothing was announced since; else it is done again. From the second time on only an announcement
    of this very object counts. A revision that was not announced yet waits for its announcement.
    What is prefetched (zeo.server.prefetching) travels many in a message: one mark is taken before the first is
    read, and looked at when all are appended, in one step. It never waits: it is tried with fewer, or left out.
    A commit is announced (zeo.server.publisher) after the storage's tpc_finish has returned, and answered,
    before the commit lock is released; its own reply counts as an announcement to the committer.
    A new session subscribes first and reads the last tid second; last tids come from the publisher.
    Finish, abort, time-out and loss claim a voted transaction in one step; who comes second does nothing.
    The commit lock (zeo.server.commitlock) is not granted to a waiter who has left. Who has finished may run the
    next vote on its own thread, after it was granted. A vote that breaks off gives the lock back, whoever runs it,
    and its connection is ended.
    Should announcing fail, the recent invalidations start afresh and every client is hung up on.

Who takes part
    sessions 0, 1   commit. A voter process each (the vote that waits for the lock); session 0
                    also has a transaction time-out that may strike whenever it is voted.
    session 2       loads (bounded by its last tid + 1, or "the current one") and pings.
    session 3       connects while all this goes on: register, getInvalidations, invalidations put
                    aside, then a load. Its cache is left over from tid 0, or it is the client of session
                    0 come back after a loss, perhaps while the old session still finishes its transaction.
    Losses          ends any connection at any step. A client that hangs up and a slow one that
                    is condemned look the same from here.

What is simplified
    - A client acts on a frame at the moment it is appended. Frames of one connection arrive in
      order and a client's state is a function of the frames so far, so every state a slow client may be in
      is also one that is checked here; a client that lost the tail of its frames is one lost earlier.
    - A storage read is one step between mark and reply. While tpc_finish runs, each read
      (and each look at the storage's last tid) may see the new transaction or not, whatever earlier
      reads saw. After tpc_finish has returned, all see it. Nothing else is asked of a storage.
    - publish holds the publisher's mutex but appends outbox by outbox; replies slip in between.
    - The client is ZEO 6.2's: the first current revision stored wins, an invalidation ends the
      entry, an own finish reply replaces it (or not, if vote reported the object), tids that go back
      are an error. `ghost` is an entry that its persistent cache forgot in memory and left current
      in the file: what a restart would serve. With -DOUR_CLIENT it is zeo.client.cache: the later
      revision wins, and an invalidation by the very tid at which an entry starts changes nothing.
    - tids are 0, 1, 2, ...: an aborted transaction leaves no gap, so that I and F can be checked by
      counting.

What is checked (each is an assertion; -DCHECKS=n, the sum of the numbers, selects some)
      1  I   invalidations in tid order, without a gap; at the end everybody has heard of everything
      2  F   the finish reply stands at its place in that order
      4  L   no "current" reply behind the invalidation that ends it
      8  P   a round trip flushes; lastTransaction is not behind a finished commit
     16  R   nothing is lost between register and the first announcement
     32  V   the same after getInvalidations
     64  N   no reply shows a tid that this outbox has not announced (starts and last tids; the end
             tid of a historic revision may be ahead, and does no harm)
    128  C   no client cache, and no cache file, holds as current what is not as of its last tid
    256  K   the commit lock and the storage's transaction are held by the one who believes so,
             and never by a connection that is gone
    512  V'  V to the letter: getInvalidations never answers less than was announced. Not checked unless
             asked for, because it is not promised and clients do not need it: what was announced
             meanwhile has been put aside.
    Spin itself looks for deadlocks ("invalid end state"): a session, vote or load that never ends.
    All loops are bounded by the number of commits, so no deadlock means: every load is answered or
    its connection is gone.

How to run
    python -m tests.models           runs everything below, in bounded memory; --help tells how to choose
    spin -DCONNECTOR=0 -a ordering.pml && gcc -O2 -w -DSAFETY -DCOLLAPSE -o pan pan.c && ./pan -m200000 -n
    spin -DLOADER=0    -a ordering.pml && ...          the connecting client instead of the loading one
    spin [same flags]  -t -p -g ordering.pml           shows the run that led to an error
    Larger: -DMAXT=3 -DCOMMITS0=2, -DOIDS=2, -DLOADS2=2, -DLOADS0=1, -DLOSSES=2, -DPINGS=1. MAXT is to be
    COMMITS0 + COMMITS1 at least. All four sessions at once (no flag) are too many for an exhaustive run;
    use gcc -DBITSTATE.

What the protections are for: -D... takes one out                       found (L: -DCONNECTOR=0, C: -DLOADER=0)
    NO_MARK            the reply does not compare the mark              L, C: stale for ever       (L)
    MARK_LATE          the mark is taken after the read                 L, C                       (L)
    AGAIN_BLINDLY      a load done again is not compared any more       L, C                       (L)
    NO_AHEAD           replies may run ahead of announcements           N; C in the cache file     (L)
    NO_WAKE            a lost connection does not wake a load that
                       waits for an announcement                        deadlock                   (L)
    NO_BASELINE        subscribing does not set `announced`             N; loads wait for nothing  (C)
    REPLY_LATE         finish reply after the lock is released          I, F, C                    (L)
    PUBLISH_LATE       publish after the lock is released               I, F; P, N with -DPINGS=1  (L)
    PUBLISH_EARLY      publish before tpc_finish has returned, on a
                       storage that does not shut out readers meanwhile L, C                       (L)
    SUBSCRIBE_SECOND   register reads the last tid, then subscribes     R; C with -DOIDS=2         (C)
    TID_FROM_STORAGE   last tids come from the storage                  N, C                       (C)
    RING_LAST          recent invalidations are noted after the mutex
                       was given up in between                          R; a load waits for ever   (C)
    LOSS_ENDS_FINISH   a committer lost during finish is not announced  I; a load waits for ever   (L)
    NO_CLAIM           time-out and finish do not claim the transaction
                       in one step                                      K, C                       (L)
    NO_REFUSE          the lock is granted to a waiter who has left     K                          (L)
    PUBLISH_FAILS      (an event, not a protection) publishing raises before anything is noted; all
                       connections are ended and the ring starts afresh: no violation
    with NO_RING_RESET ... and the ring is left as it was               R: never announced         (C)
    PARALLEL_LOADS     (an event) session 0 loads on a second thread while it finishes
                       (-DCONNECTOR=0 -DLOADER=0): no violation
    with NO_OWN_COUNT  ... and the own finish reply does not count      L, C
    PREFETCH           (instead of a load) all objects in one message (-DOIDS=2): no violation
    with PREFETCH_MARK_LATE ... and the mark is taken before the last of them
                       is read                                          L, C                       (L)
    with PREFETCH_AGAIN_BLINDLY ... and fewer of them are not compared  L, C                       (L)
    with PREFETCH_LAST_AHEAD ... and only the last of them has to be
                       announced                                        N                          (L)
    HERE               (a way to go) the thread that has finished may run the next vote: no violation
    with HERE_UNCLAIMED ... who may have left since it was granted      K                          (L)
    with REPLY_LATE    ... and it tells its own client only after that  I, F, C                    (L)
    VOTE_BREAKS        (an event) a vote breaks off, and its client is never answered: no violation
    with BROKEN_KEEPS  ... and the lock is kept                         deadlock                   (L)
    WAIT_ENDS          (an event) a storage announces so late that a load gives up waiting and its reply
                       runs ahead: no violation but N with -DOUR_CLIENT; ZEO's cache file suffers: C (L)
*/

#ifndef CHECKS
#define CHECKS 511
#endif
#define ON(k)      ((CHECKS >> (k)) & 1)
#define NEED(k, c) assert(!ON(k) || (c))
#define kI  0
#define kF  1
#define kL  2
#define kP  3
#define kR  4
#define kV  5
#define kN  6
#define kC  7
#define kK  8
#define kVS 9

#ifndef MAXT
#define MAXT 2
#endif
#ifndef COMMITS0
#define COMMITS0 1
#endif
#ifndef COMMITS1
#define COMMITS1 1
#endif
#ifndef LOADS0
#define LOADS0 0
#endif
#ifndef LOADS2
#define LOADS2 1
#endif
#ifndef LOADS3
#define LOADS3 1
#endif
#ifndef PINGS
#define PINGS 0
#endif
#ifndef LOSSES
#define LOSSES 1
#endif
#ifndef LOADER
#define LOADER 1
#endif
#ifndef CONNECTOR
#define CONNECTOR 1
#endif
#ifndef TIMEOUT
#define TIMEOUT 1
#endif
#ifndef OIDS
#define OIDS 1
#endif

#define S      4
#define NONE   255
#define MAXTID 200
#define BIT(x) (1 << (x))

mtype = { IDLE, WAITING, VOTING, VOTED, FINISHING, ABORTING };

/* the storage */
byte vis;                  /* last tid whose tpc_finish has returned            */
byte pend;                 /* tid inside tpc_finish: a read may see it or not   */
byte owner = NONE;         /* whose transaction the storage has begun           */
byte changed[MAXT + 1];    /* bit set of oids changed by each tid               */

/* the commit lock */
byte holder = NONE;

/* the publisher */
bool pmutex;
byte publast;              /* last tid announced                                */
byte floor_;               /* getInvalidations can answer from here on          */

/* sessions and outboxes */
mtype tx[S] = IDLE;
bool  sub[S], gone[S], ended[S];
byte  published[S];        /* the mark's counter                                */
byte  announced[S];        /* last tid this outbox has shown                    */
byte  base[S];             /* publast when the session subscribed               */

/* clients; a client's state is what it makes of everything appended so far    */
bool ready[S];
byte last[S];
byte early[S];             /* bit set of invalidations put aside                */
byte gap[S];               /* last tid seen, for I and F                        */

typedef Cache { byte mem[OIDS]; byte ghost[OIDS] };
Cache cache[S];

byte finrep;               /* greatest tid whose finish reply was sent          */

#define LOCKP  atomic { !pmutex -> pmutex = true }
#define UNLOCKP pmutex = false

/* Is revision r of o still current as of tid t? */
inline is_current(r, o, t, res) {
    res = true;
    x_ = r + 1;
    do
    :: x_ <= t && x_ <= MAXT ->
        if
        :: changed[x_] & BIT(o) -> res = false
        :: else
        fi;
        x_++
    :: else -> break
    od
}

inline check_cache(s) {
    o_ = 0;
    do
    :: o_ < OIDS ->
        if
        :: cache[s].mem[o_] != NONE ->
            is_current(cache[s].mem[o_], o_, last[s], ok_);
            NEED(kC, ok_)
        :: else
        fi;
        if
        :: cache[s].ghost[o_] != NONE ->
            is_current(cache[s].ghost[o_], o_, last[s], ok_);
            NEED(kC, ok_)
        :: else
        fi;
        o_++
    :: else -> break
    od
}

inline cache_invalidate(s, t) {
    o_ = 0;
    do
    :: o_ < OIDS ->
        if
        :: (changed[t] & BIT(o_)) && cache[s].mem[o_] != NONE ->
            if
#ifdef OUR_CLIENT
            :: cache[s].mem[o_] >= t
            :: else -> cache[s].mem[o_] = NONE
#else
            :: cache[s].mem[o_] == t -> cache[s].ghost[o_] = t; cache[s].mem[o_] = NONE
            :: else -> cache[s].mem[o_] = NONE
#endif
            fi
        :: else
        fi;
        o_++
    :: else -> break
    od
}

inline apply_invalidation(s, t) {
    cache_invalidate(s, t);
    NEED(kI, t >= last[s]);          /* else the client raises in setLastTid */
    if
    :: t > last[s] -> last[s] = t
    :: else
    fi;
    check_cache(s)
}

bool resting[S];            /* has done all it had to do, still connected        */
bool asked[S];              /* used getInvalidations                             */
bool quiet;                 /* everybody rests and the last checks are made      */
#ifdef PARALLEL_LOADS
bool second_done;
#else
#define second_done true
#endif

/* ---- the wire: append to s' outbox, and what the client makes of it ------- */

inline append_invalidation(s, t) {
    d_step {
        if
        :: sub[s] && !gone[s] ->
            NEED(kI, t == gap[s] + 1);
            gap[s] = t;
            published[s]++;
            announced[s] = t;
            if
            :: ready[s] -> apply_invalidation(s, t)
            :: else -> early[s] = early[s] | BIT(t)
            fi
        :: else
        fi
    }
}

inline append_finish_reply(s, t, keep) {
    d_step {
        if
        :: !gone[s] ->
            NEED(kF, t == gap[s] + 1);
            NEED(kF, t > last[s]);
            gap[s] = t;
#ifndef NO_OWN_COUNT
            published[s]++;
#endif
            announced[s] = t;
            cache_invalidate(s, t);
            o_ = 0;
            do
            :: o_ < OIDS ->
                if
                :: keep && (changed[t] & BIT(o_)) -> cache[s].mem[o_] = t
                :: else
                fi;
                o_++
            :: else -> break
            od;
            if
            :: t > last[s] -> last[s] = t
            :: else
            fi;
            if
            :: t > finrep -> finrep = t
            :: else
            fi;
            check_cache(s)
        :: else
        fi
    }
}

/* ---- publisher ----------------------------------------------------------- */

inline publish(me, t) {
    LOCKP;
#ifdef PUBLISH_FAILS
    if
    :: skip
    :: d_step {                      /* raises before anything is recorded */
#ifndef NO_RING_RESET
        publast = t; floor_ = t;
#endif
        y_ = 0;
        do
        :: y_ < S -> if :: sub[y_] -> gone[y_] = true :: else fi; y_++
        :: else -> break
        od }
       goto published_
    fi;
#endif
#ifndef RING_LAST
    publast = t;
#endif
    y_ = 0;
    do
    :: y_ < S ->
        if
        :: y_ != me -> append_invalidation(y_, t)
        :: else
        fi;
        y_++
    :: else -> break
    od;
#ifdef RING_LAST
    UNLOCKP;
    LOCKP;
    publast = t;
#endif
published_:
    UNLOCKP
}

/* ---- requests ------------------------------------------------------------ */

/* Has anything been announced to s since the mark (the first time), has this object been (later)? */
inline look_back(s, again, res) {
#if defined(NO_MARK)
    res = false;
#elif defined(AGAIN_BLINDLY)
    res = (end == NONE && !again && mark != published[s]);
#else
    if
    :: end != NONE -> res = false    /* history: needs no mark */
    :: end == NONE && !again -> res = (mark != published[s])
    :: else ->
        res = false;                 /* count n is tid base + n: announcements have no gap */
        x_ = base[s] + mark + 1;
        do
        :: x_ <= base[s] + published[s] ->
            if
            :: changed[x_] & BIT(oid) -> res = true
            :: else
            fi;
            x_++
        :: else -> break
        od;
        x_ = 0
    fi;
#endif
}

#ifdef NO_AHEAD
#define AHEAD(s) false
#else
#define AHEAD(s) (start > announced[s])
#endif
#ifdef NO_WAKE
#define WAKE(s)  false
#else
#define WAKE(s)  gone[s]
#endif

inline read_storage() {
    atomic {
        if
        :: seen = vis
        :: pend != 0 -> seen = pend
        fi;
        start = 0; end = NONE; x_ = 1;
        do
        :: x_ <= seen ->
            if
            :: (changed[x_] & BIT(oid)) && x_ < before -> start = x_; end = NONE
            :: (changed[x_] & BIT(oid)) && x_ >= before && end == NONE -> end = x_
            :: else
            fi;
            x_++
        :: else -> break
        od;
        x_ = 0; seen = 0
    }
}

inline take_in(s) {                  /* the client does, what a reply tells of one object */
    NEED(kN, start <= announced[s]);
    if
    :: end == NONE ->
        is_current(start, oid, announced[s], ok_);
        NEED(kL, ok_);
        if
        :: cache[s].mem[oid] == NONE -> cache[s].mem[oid] = start
#ifdef OUR_CLIENT
        :: cache[s].mem[oid] != NONE && cache[s].mem[oid] < start -> cache[s].mem[oid] = start
#endif
        :: else
        fi
    :: else
    fi
}

inline do_load(s) {
    if                               /* what the client asks for */
    :: before = last[s] + 1
    :: before = MAXTID
    fi;
    if
    :: oid = 0
#if OIDS > 1
    :: oid = 1
#endif
    fi;
again_:
#ifndef MARK_LATE
    mark = published[s];
#endif
    read_storage();
#ifdef MARK_LATE
    mark = published[s];
#endif
    atomic {                         /* outbox.reply */
        look_back(s, again, ok_);
        if
        :: gone[s]
        :: !gone[s] && ok_ -> again = true; goto again_
        :: !gone[s] && !ok_ && AHEAD(s) ->
            again = true;
            (announced[s] >= start || WAKE(s));
            goto again_
#ifdef WAIT_ENDS
        :: !gone[s] && !ok_ && AHEAD(s) -> goto say_
#endif
        :: !gone[s] && !ok_ && !AHEAD(s) ->
say_:       take_in(s);
            check_cache(s)
        fi;
        before = 0; oid = 0; start = 0; end = 0; mark = 0; x_ = 0; o_ = 0; ok_ = 0; again = 0
    }
}

#ifdef PREFETCH
/* All objects in one message; if that does not succeed, one in a message; if not even that, it is left out. */
inline do_prefetch(s) {
    if
    :: before = last[s] + 1
    :: before = MAXTID
    fi;
    most = OIDS;
    do
    :: from_ == OIDS || gone[s] -> break
    :: from_ < OIDS && !gone[s] ->
        mark = published[s];
        oid = from_;
        do
        :: oid < from_ + most ->
#ifdef PREFETCH_MARK_LATE
            mark = published[s];     /* before each is read: the last one counts */
#endif
            read_storage();
            d_step { starts[oid] = start; ends[oid] = end; start = 0; end = 0; oid++ }
        :: oid == from_ + most -> break
        od;
        atomic {                     /* outbox.reply_to_load */
#ifdef PREFETCH_AGAIN_BLINDLY
            ok_ = (most < OIDS || mark == published[s]);
#else
            ok_ = (mark == published[s]);
#endif
            oid = from_;
            do
            :: oid < from_ + most ->
#ifdef PREFETCH_LAST_AHEAD
                if :: oid == from_ + most - 1 -> ok_ = ok_ && starts[oid] <= announced[s] :: else fi;
#else
                ok_ = ok_ && starts[oid] <= announced[s];
#endif
                oid++
            :: else -> break
            od;
            if
            :: gone[s]
            :: !gone[s] && ok_ ->
                oid = from_;
                do
                :: oid < from_ + most ->
                    start = starts[oid]; end = ends[oid];
                    take_in(s);
                    oid++
                :: else -> break
                od;
                check_cache(s);
                from_ = from_ + most
            :: !gone[s] && !ok_ && most > 1 -> most = 1
            :: !gone[s] && !ok_ && most == 1 -> from_++
            fi;
            oid = 0; start = 0; end = 0; mark = 0; x_ = 0; o_ = 0; ok_ = 0;
            y_ = 0;
            do
            :: y_ < OIDS -> starts[y_] = 0; ends[y_] = 0; y_++
            :: else -> break
            od;
            y_ = 0
        }
    od;
    atomic { before = 0; from_ = 0; most = 0 }
}
#endif

inline do_ping(s) {                  /* ping and lastTransaction in one */
    seen = finrep;                   /* the request arrives */
#ifdef TID_FROM_STORAGE
    atomic { if :: start = vis :: pend != 0 -> start = pend fi };
#else
    LOCKP; start = publast; UNLOCKP;
#endif
    atomic {
        if
        :: !gone[s] ->
            NEED(kP, announced[s] >= seen);
            NEED(kP, start >= seen);
            NEED(kN, start <= announced[s])
        :: else
        fi;
        seen = 0; start = 0
    }
}

inline verified(s, t) {
    if
    :: t > last[s] -> last[s] = t
    :: else
    fi;
    y_ = 1;
    do
    :: y_ <= MAXT ->
        if
        :: (early[s] & BIT(y_)) && y_ > t -> apply_invalidation(s, y_)
        :: else
        fi;
        y_++
    :: else -> break
    od;
    early[s] = 0;
    ready[s] = true;
    check_cache(s)
}

inline subscribe(s) {
    LOCKP;
    atomic {
        sub[s] = true; base[s] = publast; gap[s] = publast;
#ifndef NO_BASELINE
        announced[s] = publast;
#endif
    }
    UNLOCKP
}

inline do_register(s) {
#ifndef SUBSCRIBE_SECOND
    subscribe(s);
#endif
#ifdef TID_FROM_STORAGE
    atomic { if :: start = vis :: pend != 0 -> start = pend fi };
#else
    LOCKP; start = publast; UNLOCKP;
#endif
#ifdef SUBSCRIBE_SECOND
    subscribe(s);
#endif
    d_step {                         /* the reply, and the client's decision */
        end = 0;
        if
        :: gone[s]
        :: else ->
            NEED(kR, base[s] <= start);
            NEED(kN, start <= announced[s]);
            NEED(kR, last[s] <= start);
            ok_ = true;              /* is the cache empty? */
            o_ = 0;
            do
            :: o_ < OIDS ->
                if :: cache[s].mem[o_] != NONE -> ok_ = false :: else fi;
                o_++
            :: else -> break
            od;
            if
            :: ok_ || last[s] == start -> verified(s, start)
            :: else -> end = 1
            fi
        fi
    }
    if
    :: end == 1 && !gone[s] -> do_get_invalidations(s)
    :: else
    fi;
    d_step { start = 0; end = 0; mark = 0; x_ = 0; y_ = 0; o_ = 0; ok_ = 0 }
}

inline do_get_invalidations(s) {
    asked[s] = true;
    LOCKP;
    d_step {
        if
        :: last[s] < floor_ -> start = NONE
        :: else ->
            start = publast; mark = 0; x_ = last[s] + 1;
            do
            :: x_ <= start -> mark = mark | changed[x_]; x_++
            :: else -> break
            od
        fi
    }
    UNLOCKP;
#ifdef TID_FROM_STORAGE
    if
    :: start == NONE || start > vis
    :: else ->
        atomic { if :: start = vis :: pend != 0 -> start = pend fi }
    fi;
#endif
    d_step {
        if
        :: gone[s]
        :: else ->
            if
            :: start == NONE ->      /* drop the whole cache */
                o_ = 0;
                do
                :: o_ < OIDS -> cache[s].mem[o_] = NONE; cache[s].ghost[o_] = NONE; o_++
                :: else -> break
                od;
                start = floor_;
            :: else ->
                o_ = 0;
                do
                :: o_ < OIDS ->
                    if :: mark & BIT(o_) -> cache[s].mem[o_] = NONE :: else fi;
                    o_++
                :: else -> break
                od
            fi;
            NEED(kVS, start >= announced[s]);
            NEED(kN, start <= announced[s]);
            verified(s, start)
        fi
    }
}

#define ABORT(s) \
    d_step { NEED(kK, owner == s); owner = NONE }; \
    d_step { NEED(kK, holder == s); holder = NONE }

inline do_vote(v) {
    atomic { NEED(kK, owner == NONE); owner = v };
    if
    :: tx[v] = VOTED
    :: ABORT(v); tx[v] = IDLE        /* a conflict */
#ifdef VOTE_BREAKS
#ifdef BROKEN_KEEPS
    :: gone[v] = true
#else
    :: ABORT(v); tx[v] = IDLE; gone[v] = true
#endif
#endif
    fi
}

inline do_finish(s) {
    if
    :: atomic { tx[s] == VOTED -> tx[s] = FINISHING }
    :: tx[s] != VOTED -> goto leave_  /* the time-out was faster */
    fi;
    atomic {
        NEED(kK, owner == s && holder == s);
        start = vis + 1;
        if
        :: changed[start] = 1
#if OIDS > 1
        :: changed[start] = 2
        :: changed[start] = 3
#endif
        fi;
        pend = start
    }
#ifdef PUBLISH_EARLY
    publish(s, start);
#endif
    d_step { vis = start; pend = 0; owner = NONE }
#if !defined(PUBLISH_EARLY) && !defined(PUBLISH_LATE)
#ifdef LOSS_ENDS_FINISH
    if
    :: gone[s]
    :: !gone[s] -> publish(s, start)
    fi;
#else
    publish(s, start);
#endif
#endif
#ifndef REPLY_LATE
    if
    :: append_finish_reply(s, start, true)
    :: append_finish_reply(s, start, false)
    fi;
#endif
    atomic {
        NEED(kK, holder == s);
        holder = NONE;
        tx[s] = IDLE;
#ifdef HERE
        ok_ = false;
        if                           /* this thread may run the next vote */
        :: tx[1 - s] == WAITING ->
            holder = 1 - s; ok_ = true;
#ifndef HERE_UNCLAIMED
            tx[1 - s] = VOTING
#endif
        :: true
        fi
#endif
    }
#ifdef HERE
    if
    :: ok_ ->
        ok_ = false;
#ifdef HERE_UNCLAIMED
        tx[1 - s] = VOTING;
#endif
        do_vote(1 - s)
    :: !ok_
    fi;
#endif
#ifdef PUBLISH_LATE
    publish(s, start);
#endif
#ifdef REPLY_LATE
    append_finish_reply(s, start, true);
#endif
    d_step { start = 0; y_ = 0; o_ = 0; x_ = 0; ok_ = 0 }
}

/* ---- processes ----------------------------------------------------------- */

proctype Session(byte s; byte commits; byte loads; byte pings) {
    byte before, oid, seen, start, end, mark, x_, y_, o_;
    bool ok_, again;
#ifdef PREFETCH
    byte from_, most, starts[OIDS], ends[OIDS];
#endif

    if
    :: s == 3 ->
        if
        :: skip                      /* a cache left over from tid 0 */
        :: atomic {                  /* the client of session 0 comes back */
            gone[0] ->
            last[3] = last[0];
            do
            :: o_ < OIDS ->
                cache[3].mem[o_] = cache[0].mem[o_];
                cache[3].ghost[o_] = cache[0].ghost[o_];
                o_++
            :: else -> break
            od;
            o_ = 0 }
        fi;
        do_register(s)
    :: else
    fi;

    do
    :: gone[s] -> break
#ifdef PREFETCH
    :: !gone[s] && ready[s] && loads > 0 -> loads--; do_prefetch(s)
#else
    :: !gone[s] && ready[s] && loads > 0 -> loads--; do_load(s)
#endif
    :: !gone[s] && ready[s] && pings > 0 -> pings--; do_ping(s)
    :: atomic { !gone[s] && commits > 0 && tx[s] == IDLE -> commits--; tx[s] = WAITING }
    :: atomic { !gone[s] && tx[s] == WAITING -> tx[s] = IDLE }     /* tpc_abort */
    :: !gone[s] && tx[s] == VOTED -> do_finish(s)
    :: !gone[s] && tx[s] == VOTED -> goto abort_
    :: !gone[s] && commits + loads + pings == 0 && tx[s] == IDLE ->
        resting[s] = true;
        (gone[s] || quiet);
        break
    od;
    /* the connection is gone */
    goto leave_;

abort_:
    if
    :: atomic { tx[s] == VOTED -> tx[s] = ABORTING };
       ABORT(s);
       tx[s] = IDLE
    :: tx[s] == IDLE
    fi;
leave_:
    atomic {
        if
        :: tx[s] == WAITING -> tx[s] = IDLE                       /* leave the queue */
        :: else
        fi
    }
    if
    :: tx[s] == VOTED -> goto abort_
    :: tx[s] == IDLE
    fi;
    LOCKP;
    gone[s] = true; sub[s] = false;
    UNLOCKP;
    NEED(kK, holder != s);
    ended[s] = true
}

proctype Voter(byte s) {
    do
#ifdef NO_REFUSE
    :: tx[s] == WAITING ->
        atomic { holder == NONE -> holder = s; NEED(kK, !ended[s]); tx[s] = VOTING };
#else
    :: atomic { tx[s] == WAITING && holder == NONE -> holder = s; tx[s] = VOTING };
#endif
        do_vote(s)
    :: ended[s] && tx[s] != VOTING -> break
    od
}

proctype TimeOut(byte s) {
#ifdef NO_CLAIM
    if
    :: tx[s] == VOTED -> skip; ABORT(s); gone[s] = true; tx[s] = IDLE
#else
    if
    :: atomic { tx[s] == VOTED -> tx[s] = ABORTING };
       ABORT(s); gone[s] = true; tx[s] = IDLE
#endif
    :: ended[s]
    fi
}

#ifdef PARALLEL_LOADS
proctype SecondThread(byte s) {
    byte before, oid, seen, start, end, mark, x_, o_;
    bool ok_, again;
    do_load(s);
    second_done = true
}
#endif

proctype Losses(byte n) {
    do
    :: n > 0 && !quiet -> n--;
        if
        :: quiet
        :: !ended[0] -> gone[0] = true
        :: !ended[1] -> gone[1] = true
        :: !ended[2] -> gone[2] = true
        :: !ended[3] -> gone[3] = true
        fi
    :: ended[0] && ended[1] && ended[2] && ended[3] -> break
    od
}

#define STILL(s) (resting[s] || ended[s])

init {
    byte s, o_, x_;
    bool ok_;
    d_step {
        changed[0] = 255;
        do
        :: s < S ->
            o_ = 0;
            do
            :: o_ < OIDS ->
                cache[s].ghost[o_] = NONE;
                if
                :: s == 2 -> cache[s].mem[o_] = NONE
                :: else   -> cache[s].mem[o_] = 0
                fi;
                o_++
            :: else -> break
            od;
            sub[s] = (s != 3); ready[s] = (s != 3);
            s++
        :: else -> break
        od;
        s = 0; o_ = 0
    }
    atomic {
        run Session(0, COMMITS0, LOADS0, 0);
        run Session(1, COMMITS1, 0, 0);
        if
        :: LOADER -> run Session(2, 0, LOADS2, PINGS)
        :: else -> gone[2] = true; ended[2] = true; sub[2] = false
        fi;
        if
        :: CONNECTOR -> run Session(3, 0, LOADS3, 0)
        :: else -> gone[3] = true; ended[3] = true
        fi;
        run Voter(0); run Voter(1);
#ifdef PARALLEL_LOADS
        run SecondThread(0);
#endif
        if
        :: TIMEOUT -> run TimeOut(0)
        :: else
        fi;
        run Losses(LOSSES)
    }
    /* Everybody rests: has everybody still connected heard of everything? */
    atomic {
        STILL(0) && STILL(1) && STILL(2) && STILL(3) && second_done && !pmutex && pend == 0 ->
        NEED(kK, holder == NONE && owner == NONE);
        do
        :: s < S ->
            if
            :: resting[s] && !gone[s] && !ended[s] ->
                if
                :: s == 3 && asked[s]  -> NEED(kV, last[s] == vis)
                :: s == 3 && !asked[s] -> NEED(kR, last[s] == vis)
                :: s != 3              -> NEED(kI, last[s] == vis)
                fi;
                check_cache(s)
            :: else
            fi;
            s++
        :: else -> break
        od;
        quiet = true
    }
}
