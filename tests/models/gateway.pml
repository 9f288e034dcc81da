/* Several zeo servers over one database that they poll: a model for Spin (https://spinroot.com).

ordering.pml has one server that knows of every commit, because it made it.  Here each server learns of
other servers' commits only when it looks (zeo.server.gateway).  What keeps its clients' caches right, and
what this model checks within small bounds, exhaustively:

    The database commits one transaction at a time, in tid order; a snapshot taken afterwards shows it.
    Polls and announcements are made by who has the server's turn: what came into sight is announced one by
    one, in tid order, each with its own oids.  Own commits hold the turn from before their COMMIT until they
    are answered, so no poll takes an own transaction for a foreign one; they poll, announce foreign ones
    below to everybody, the committer included, and own ones as ordering.pml has it.
    Loads read from snapshots that are kept, of a generation each.  The generation moves before anything is
    announced; a load reads it, and if the snapshot is of another one, takes a new one, and then reads.
    No lock is held; the reply enters under the mark, as in ordering.pml, and waits until what it shows has
    been announced here.
    register, ping and lastTransaction poll first, and tell what was announced then.
    A pack of the database removes revisions that later ones, up to the time of the pack, have replaced. If a
    poll finds a transaction not announced here that was packed, it announces none of what it found: the server
    begins afresh with the last one, and hangs up on everybody; who is hung up on comes back.

Who takes part
    server 0    session 0 commits, session 2 loads and pings.
    server 1    session 1 commits; session 3 loads, and may come over from server 0 with its cache.
    Each has a poller.  Server 0 may be killed at any step; what was committed stays in the database.
    Somebody may pack the database up to any transaction, once.

What is simplified: as in ordering.pml; and there can be no conflict, a vote that fails changes nothing. Loads of
revisions that were packed away are answered as before. Session 3 does not come back once it is hung up on.

What is checked (each is an assertion; -DCHECKS=n, the sum of the numbers, selects some)
      1  I   announcements in tid order, without a gap; at the end everybody has heard of everything
      2  F   the finish reply stands at its place in that order
      4  L   no "current" reply behind the announcement that ends it
      8  P   after a round trip to any server a client knows of what any server had answered before
     16  R   a client that comes over finds no server that is behind it, and nothing is lost in between
     64  N   no reply shows a tid that was not announced here
    128  C   no cache holds as current what is not as of its last tid
    Spin itself looks for deadlocks: a load, or a commit, that never ends.

How to run
    python -m tests.models gateway
    spin -DMOVER=0 -a gateway.pml && gcc -O2 -w -DSAFETY -DCOLLAPSE -o pan pan.c && ./pan -m20000 -n
    spin -DLOADER=0 -a gateway.pml && ...              without session 2, with session 3
    Larger: -DMAXT=3 -DCOMMITS1=2 (MAXT is to be COMMITS0 + COMMITS1), -DPINGS=1, -DKILLS=1, -DPACKS=1 (with
    -DOIDS=2 -DCOMMITS0=0 -DCOMMITS1=2 torn ones, without who is just finishing one); too many for an
    exhaustive run: -DOIDS=2 else, -DLOADS=2, and both sessions at once (use gcc -DBITSTATE).

What the protections are for: -D... takes one out                                      found
    NO_TURN            polls and own commits announce at the same time                 I, F
    TURN_LATE          the turn is taken after COMMIT: a poll takes ours for foreign   F
    MERGED             a poll announces all it has found as one transaction            I
    GENERATION_LATE    the generation moves after the announcements                    L, C
    GENERATION_SECOND  a load takes a new snapshot, then reads the generation          L, C
    SNAPSHOT_KEPT      loads go on reading from the snapshot that they have            L, C
    NO_MARK            the reply to a load does not compare the mark                   L, C
    NO_AHEAD           replies may run ahead of announcements                          N
    FOREIGN_LATE       the finish reply comes before the foreign ones below            F
    FOREIGN_TO_OTHERS  the committer is not told of foreign ones below                 F
    PING_BLINDLY       ping does not poll                                              P (-DPINGS=1)
    REGISTER_BLINDLY   register does not poll                                          R
    TID_FROM_DATABASE  register tells the database's last tid                          R
    PACKED_BLINDLY     transactions that were packed are announced with what is left   C (-DPACKS=1 -DOIDS=2)
    AFRESH_QUIETLY     the server begins afresh, and hangs up on nobody                I (-DPACKS=1)
*/

#ifndef CHECKS
#define CHECKS 223
#endif
#define NEED(k, c) assert(!((CHECKS >> (k)) & 1) || (c))
#define kI  0
#define kF  1
#define kL  2
#define kP  3
#define kR  4
#define kN  6
#define kC  7

#ifndef MAXT
#define MAXT 2
#endif
#ifndef COMMITS0
#define COMMITS0 1
#endif
#ifndef COMMITS1
#define COMMITS1 1
#endif
#ifndef LOADS
#define LOADS 1
#endif
#ifndef PINGS
#define PINGS 0
#endif
#ifndef OIDS
#define OIDS 1
#endif
#ifndef KILLS
#define KILLS 0
#endif
#ifndef PACKS
#define PACKS 0
#endif
#ifndef LOADER
#define LOADER 1
#endif
#ifndef MOVER
#define MOVER 1
#endif

#define S      4
#define NONE   255
#define MAXTID 200
#define BIT(x) (1 << (x))

/* the database */
byte vis;                  /* last tid committed                                 */
byte changed[MAXT + 1];    /* bit set of oids changed by each tid                */
byte packed;               /* last tid up to which it was packed                 */

/* the servers */
bool turn[2];              /* who polls and announces                            */
bool down[2];              /* killed                                             */
byte generation[2];        /* moves when something new is in the database        */
byte publast[2];           /* last tid announced                                 */

/* sessions and outboxes; sessions 0 and 2 are at server 0, 1 and 3 at server 1  */
byte at[S];
byte snap[S];              /* last tid in the snapshot that its loads read from  */
byte snapof[S];            /* the generation of that snapshot                    */
bool sub[S], resting[S];
byte published[S];         /* the mark's counter                                 */
byte announced[S];         /* last tid this outbox has shown                     */

/* clients */
bool ready[S];
byte last[S];
byte early[S];             /* bit set of announcements put aside                 */
byte gap[S];               /* last tid seen, for I and F                         */
typedef Cache { byte mem[OIDS] };
Cache cache[S];

byte finrep;               /* greatest tid whose finish reply was sent, anywhere */
byte answered[S];          /* tid of its last finish reply                       */
bool quiet;

#ifdef NO_TURN
#define TAKE(v) skip
#define GIVE(v) skip
#else
#define TAKE(v) atomic { !turn[v] -> turn[v] = true }
#define GIVE(v) turn[v] = false
#endif
#define GONE(s) (down[at[s]] || !sub[s])
#define HUNG_UP(s) (PACKS && !down[at[s]] && !sub[s])

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
    od;
    x_ = 0
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
        o_++
    :: else -> break
    od;
    o_ = 0; ok_ = false
}

inline forget(s, oids, t) {
    o_ = 0;
    do
    :: o_ < OIDS ->
        if
        :: ((oids) & BIT(o_)) && cache[s].mem[o_] != NONE && cache[s].mem[o_] < t -> cache[s].mem[o_] = NONE
        :: else
        fi;
        o_++
    :: else -> break
    od;
    o_ = 0
}

#ifdef PACKED_BLINDLY
inline look_what_is_left(t, upto) {  /* into left_, of what t changed */
    d_step {
        left_ = changed[t]; y_ = t + 1;
        do
        :: y_ <= upto && y_ <= MAXT -> left_ = left_ & ~changed[y_]; y_++
        :: else -> break
        od;
        y_ = 0
    }
}
#define LEFT_OF(t) left_
#define AND_LEFT , left_
#else
#define LEFT_OF(t) changed[t]
#define AND_LEFT
#endif

inline hear(s, t, oids) {
    forget(s, oids, t);
    NEED(kI, t >= last[s]);
    if
    :: t > last[s] -> last[s] = t
    :: else
    fi;
    check_cache(s)
}

/* ---- announcing; with the turn ------------------------------------------- */

inline announce_to(s, t) {
    d_step {
        if
        :: !GONE(s) ->
            NEED(kI, t == gap[s] + 1);
            gap[s] = t;
            published[s]++;
            announced[s] = t;
            if
            :: ready[s] -> hear(s, t, LEFT_OF(t))
            :: else -> early[s] = early[s] | BIT(t)
            fi
        :: else
        fi
    }
}

inline answer(s, t) {                /* the reply to tpc_finish */
    d_step {
        if
        :: !GONE(s) ->
            NEED(kF, t == gap[s] + 1);
            NEED(kF, t > last[s]);
            gap[s] = t;
            published[s]++;
            announced[s] = t;
            answered[s] = t;
            o_ = 0;
            do
            :: o_ < OIDS ->
                if
                :: changed[t] & BIT(o_) -> cache[s].mem[o_] = t
                :: else
                fi;
                o_++
            :: else -> break
            od;
            o_ = 0;
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

#ifdef FOREIGN_TO_OTHERS
#define HEARS_NOT(t, own) (own != NONE && t <= own)
#else
#define HEARS_NOT(t, own) (t == own)
#endif

inline begin_afresh(v, t) {          /* the ring of recent invalidations, too, under the publisher's mutex */
    d_step {
        publast[v] = t;
        y_ = 0;
        do
        :: y_ < S ->
            if
#ifndef AFRESH_QUIETLY
            :: at[y_] == v && sub[y_] ->
                sub[y_] = false; ready[y_] = false; early[y_] = 0;
                if
                :: y_ != 3 -> resting[y_] = false
                :: else
                fi
#endif
            :: else
            fi;
            y_++
        :: else -> break
        od;
        y_ = 0
    }
}

inline poll(v, own, s) {             /* the finish of `own` by session s, or NONE */
    atomic { seen_ = vis; upto_ = packed }
#ifndef GENERATION_LATE
    if
    :: publast[v] < seen_ -> generation[v]++
    :: else
    fi;
#endif
#ifdef FOREIGN_LATE
    if
    :: own != NONE -> answer(s, own)
    :: else
    fi;
#endif
#ifndef PACKED_BLINDLY
    if
    :: upto_ > publast[v] -> begin_afresh(v, seen_)
    :: else
    fi;
#endif
#ifdef MERGED
    if
    :: publast[v] < seen_ -> publast[v] = seen_ - 1
    :: else
    fi;
#endif
    do
    :: publast[v] < seen_ && !down[v] ->
        t_ = publast[v] + 1;
#ifdef PACKED_BLINDLY
        look_what_is_left(t_, upto_);
#endif
        y_ = 0;
        do
        :: y_ < S ->
            if
            :: at[y_] == v && y_ == s && t_ == own -> answer(y_, t_)
            :: at[y_] == v && !(y_ == s && HEARS_NOT(t_, own)) -> announce_to(y_, t_)
            :: else
            fi;
            y_++
        :: else -> break
        od;
        publast[v] = t_
    :: else -> break
    od;
#ifdef GENERATION_LATE
    generation[v]++;
#endif
    atomic { seen_ = 0; upto_ = 0; t_ = 0; y_ = 0 }
}

/* ---- requests ------------------------------------------------------------- */

#ifdef NO_AHEAD
#define AHEAD(s) false
#else
#define AHEAD(s) (start > announced[s])
#endif

#ifdef NO_MARK
#define OUTDATED(s) false
#else
#define OUTDATED(s) (end == NONE && mark != published[s])
#endif

inline do_load(s) {
    if
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
    mark = published[s];
#ifdef SNAPSHOT_KEPT
    skip;
#else
#ifdef GENERATION_SECOND
    if
    :: snapof[s] != generation[at[s]] -> snap[s] = vis; snapof[s] = generation[at[s]]
    :: else
    fi;
#else
    if
    :: snapof[s] != generation[at[s]] -> snapof[s] = generation[at[s]]; snap[s] = vis
    :: else
    fi;
#endif
#endif
    d_step {                         /* read from the snapshot */
        start = 0; end = NONE; x_ = 1;
        do
        :: x_ <= snap[s] ->
            if
            :: (changed[x_] & BIT(oid)) && x_ < before -> start = x_; end = NONE
            :: (changed[x_] & BIT(oid)) && x_ >= before && end == NONE -> end = x_
            :: else
            fi;
            x_++
        :: else -> break
        od;
        x_ = 0
    }
    atomic {                         /* outbox.reply */
        if
        :: GONE(s)
        :: !GONE(s) && OUTDATED(s) -> goto again_
        :: !GONE(s) && !OUTDATED(s) && AHEAD(s) -> (announced[s] >= start || GONE(s)); goto again_
        :: else ->
            NEED(kN, start <= announced[s]);
            if
            :: end == NONE ->
                is_current(start, oid, announced[s], ok_);
                NEED(kL, ok_);
                if
                :: cache[s].mem[oid] == NONE || cache[s].mem[oid] < start -> cache[s].mem[oid] = start
                :: else
                fi
            :: else
            fi;
            check_cache(s)
        fi;
        before = 0; oid = 0; start = 0; end = 0; mark = 0
    }
}

inline do_ping(s) {
    wanted = finrep;                 /* the request arrives */
#ifndef PING_BLINDLY
    TAKE(at[s]);
    poll(at[s], NONE, s);
    GIVE(at[s]);
#endif
    d_step {
        if
        :: !GONE(s) -> NEED(kP, announced[s] >= wanted)
        :: else
        fi;
        wanted = 0
    }
}

inline do_commit(s) {
#ifndef TURN_LATE
    TAKE(at[s]);
#endif
    atomic {                         /* the writer instance's COMMIT */
        if
        :: down[at[s]]
        :: else ->
            vis++;
            mine = vis;
            if
            :: changed[vis] = 1
#if OIDS > 1
            :: changed[vis] = 2
            :: changed[vis] = 3
#endif
            fi
        fi
    }
#ifdef TURN_LATE
    TAKE(at[s]);
#endif
    if
    :: mine == 0 || down[at[s]]
    :: else ->
        poll(at[s], mine, s);
        NEED(kF, GONE(s) || answered[s] == mine)
    fi;
    mine = 0;
    GIVE(at[s])
}

/* Connect to server v with the cache that there is: register, and catch up from the database. */
inline do_register(s, v) {
#ifndef REGISTER_BLINDLY
    TAKE(v);
    poll(v, NONE, s);
#endif
    d_step {
        at[s] = v;
        sub[s] = true;
        gap[s] = publast[v];
        announced[s] = publast[v];
        start = publast[v];
#ifdef TID_FROM_DATABASE
        start = vis;
#endif
        NEED(kR, start <= announced[s]);
        NEED(kR, last[s] <= start)
    }
#ifndef REGISTER_BLINDLY
    GIVE(v);
#endif
    d_step {                         /* getInvalidations, up to what was told */
        if
        :: !GONE(s) ->
            x_ = last[s] + 1;
            mark = 0;
            do
            :: x_ <= start && x_ <= MAXT -> mark = mark | changed[x_]; x_++
            :: else -> break
            od;
            forget(s, mark, MAXTID);
            if
            :: start > last[s] -> last[s] = start
            :: else
            fi;
            y_ = 1;
            do
            :: y_ <= MAXT ->
                if
                :: (early[s] & BIT(y_)) && y_ > start -> hear(s, y_, changed[y_])
                :: else
                fi;
                y_++
            :: else -> break
            od;
            early[s] = 0;
            ready[s] = true;
            check_cache(s)
        :: else
        fi;
        start = 0; mark = 0; x_ = 0; y_ = 0
    }
}

/* ---- processes --------------------------------------------------------------- */

proctype Session(byte s; byte commits; byte loads; byte pings) {
    byte before, oid, start, end, mark, mine, wanted, seen_, upto_, t_, x_, y_, o_ AND_LEFT;
    bool ok_;

    do
    :: GONE(s) && !HUNG_UP(s) -> break
    :: HUNG_UP(s) -> resting[s] = false; do_register(s, at[s])
    :: !GONE(s) && commits > 0 -> commits--; do_commit(s)
    :: !GONE(s) && loads > 0 -> loads--; do_load(s)
    :: !GONE(s) && pings > 0 -> pings--; do_ping(s)
    :: !GONE(s) && commits + loads + pings == 0 ->
        resting[s] = true;
        if
        :: quiet -> break
        :: GONE(s)
        fi
    od;
    resting[s] = true
}

/* Session 3 comes to server 1: with the cache that the client of session 0 has by now, or one as of tid 0. */
proctype Mover(byte loads) {
    byte before, oid, start, end, mark, seen_, upto_, t_, x_, y_, o_ AND_LEFT;
    bool ok_;

    if
    :: skip
    :: atomic {
        last[3] = last[0];
        do
        :: o_ < OIDS -> cache[3].mem[o_] = cache[0].mem[o_]; o_++
        :: else -> break
        od;
        o_ = 0 }
    fi;
    do_register(3, 1);
    do
    :: !GONE(3) && loads > 0 -> loads--; do_load(3)
    :: else -> break
    od;
    resting[3] = true
}

proctype Poller(byte v) {
    byte seen_, upto_, t_, y_, o_, x_ AND_LEFT;
    bool ok_;
    do
    :: publast[v] < vis && !down[v] ->
        TAKE(v);
        poll(v, NONE, NONE);
        GIVE(v)
    :: quiet || down[v] -> break
    od
}

proctype Killer(byte n) {
    if
    :: n > 0 -> down[0] = true
    :: true
    fi
}

proctype Packer() {
    if
    :: atomic { vis > 0 -> packed = vis }
    :: atomic { vis > 1 -> packed = vis - 1 }
    :: true
    fi
}

init {
    byte s, o_, x_;
    bool ok_;
    d_step {
        changed[0] = 255;
        at[1] = 1; at[3] = 1;
        do
        :: s < S ->
            o_ = 0;
            do
            :: o_ < OIDS ->
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
        run Session(0, COMMITS0, 0, 0);
        run Session(1, COMMITS1, 0, 0);
        if
        :: LOADER -> run Session(2, 0, LOADS, PINGS)
        :: else -> sub[2] = false; resting[2] = true
        fi;
        if
        :: MOVER -> run Mover(1)
        :: else -> resting[3] = true
        fi;
        run Poller(0); run Poller(1);
        run Killer(KILLS);
        if
        :: PACKS -> run Packer()
        :: else
        fi
    }
    atomic {
        resting[0] && resting[1] && resting[2] && resting[3] &&
        (down[0] || (!turn[0] && publast[0] == vis)) && !turn[1] && publast[1] == vis ->
        do
        :: s < S ->
            if
            :: !GONE(s) ->
                NEED(kI, last[s] == vis);
                check_cache(s)
            :: else
            fi;
            s++
        :: else -> break
        od;
        quiet = true
    }
}
