/* Who reads the socket of a client connection: the reading turn, a model for Spin (https://spinroot.com).
 *
 * THE DESIGN (zeo.client.readingturn)
 *   There is no thread whose job it is to read. A calling thread registers its request, sends it holding
 *   no turn, and only then looks for its reply: is the turn to read free, it takes it and becomes the
 *   leader, who reads and dispatches whatever arrives until its own reply is there; else it parks and
 *   sleeps. A leaving leader gives the turn to a sleeper and wakes it; if there is none it frees the
 *   turn, looks once more, and takes it back if somebody parked meanwhile. A watcher thread takes a free
 *   turn when it finds nobody calling, or a sender stuck because the socket's buffer is full, and
 *   leaves in the same way once it has read for a call.
 *   What must be impossible: that nobody reads while somebody waits.
 *
 *   A caller does not wait for another one that is sending (zeo.client.outgoing): it leaves its request to
 *   that one, if that is one that looks for such requests (`relieving`) once more after it has given the lock
 *   back. So what was left is sent, by somebody. Some time it has done so often enough (here: whenever it
 *   likes, once its own is sent): then it sends what was left once more, without that promise, and goes.
 *
 *   The turn is a lock. Besides there are two dictionaries, and no mutex around them:
 *   parked[c] is the right to wake c: whoever removes the entry wakes c, once.
 *   request[c] is the right to answer c: whoever removes it answers, once. It outlives a caller
 *   that gave up waiting, because the effects of its reply (own commit!) must still happen.
 *
 * WHAT IS MODELLED
 *   One connection. The server answers in any order, sends invalidations whenever it likes, and does not
 *   read while it is itself stuck sending. Socket buffers are bounded; one recv may bring in several
 *   messages, and what its reader has not dispatched stays in the shared buffer `inbox`.
 *   Every step is one that Python does indivisibly: a lock tried or released, an entry put into
 *   or popped from a dict, an attribute set.
 *
 *   Chosen freely at the start of every run: with -DLEAVING each caller may or may not be one
 *   that gives up (asleep; with half a frame sent, or as leader with a message half read, which
 *   both end the connection; or as leader between two messages, cleanly); with -DDYING the server
 *   may or may not be one that hangs up some time; with -DCLOSING there may or may not be a thread
 *   that calls close() some time; with -DBEATING there is a thread that now and then has the sending lock
 *   for a moment and does not look for requests that were left (it sends signs of life). Runs in which nobody leaves, dies or closes are always among
 *   them, so that nothing is rescued by chance.
 *   The watcher here never helps a caller that sleeps: a forgotten caller is a deadlock.
 *
 * WHAT IS CHECKED
 *   never two readers; effects in wire order, one at a time; no deadlock (= no call without end,
 *   no lost wake-up, no sender and server stuck in each other): when nothing more can happen, all
 *   callers have ended, each answered, failed or given up; a sleeper is woken once; unless the
 *   connection is dead, each invalidation and each reply (also to a caller that left) has had its
 *   effects, also when no call follows; after death the watcher has closed the file descriptor,
 *   while nobody was reading or sending, and has ended.
 *
 * NOT MODELLED  the contents of messages; what an effect does (it may not call the server: such a
 *   call raises, it does not wait); calls from a signal handler or destructor inside a call (the
 *   same); fork (the child makes new locks and a new connection and touches nothing of these).
 *   Before it leaves, a leader may also dispatch the whole messages left in the inbox: that
 *   only makes them heard sooner, so it is not in the model.
 *
 * BOUNDS  N callers (2), CALLS calls each (2), INV invalidations (1), socket buffers of ROOM (1)
 *   units, a request of caller 0 and each reply is PARTS (2) units long.
 *   All of these end with "errors: 0" (1 to 56 million states; seconds to four minutes; up to 3 GB):
 *     -DCALLS=2                                  two calls of each
 *     -DCALLS=1 -DINV=2                          a server stuck in invalidations alone
 *     -DCALLS=1 -DROOM=2                         several messages in one recv
 *     -DN=3 -DCALLS=1 -DINV=0 -DPARTS=1 -DWAITING
 *                                                three callers, which wait for each other to send
 *                                                (to leave requests has too many states then)
 *     -DCALLS=1 -DLEAVING -DWAITING              callers that give up, and wait for each other to send
 *     -DCALLS=1 -DLEAVING -DINV=0 -DPARTS=1      callers that give up
 *     -DCALLS=1 -DDYING                          the server hangs up
 *     -DCALLS=1 -DCLOSING -DINV=0 -DPARTS=1      close() at any moment
 *     -DCALLS=1 -DBEATING                        signs of life between the requests
 *
 * HOW TO RUN
 *   python -m tests.models          runs everything named here, in bounded memory; --help tells how to choose
 *   spin -a [-D...] reading_turn.pml && cc -O2 -DSAFETY -DCOLLAPSE -o pan pan.c && ./pan -E -m1000000
 *   "errors: 0" is the proof within the bounds; otherwise  spin -t -p [-D...] reading_turn.pml
 *   shows the way into the error.
 *
 * PLANTED MISTAKES  (-DCALLS=1 -DMISTAKE_... each must give an error within seconds; those marked
 *   L also need -DLEAVING, C -DCLOSING, I -DINV=2, R -DROOM=2, B -DBEATING; 2: -DCALLS=2 -DINV=0)
 *   FREE_AND_GO      leader frees the turn and wakes nobody            sleeper forgotten
 *   LOOK_THEN_FREE   looks for sleepers before freeing, not after      sleeper forgotten
 *   PARK_BLINDLY     sleeper does not try the turn after parking       sleeper forgotten
 * L KEEP_GIFT        leaves by exception with the turn just given      turn lost
 * L DONE_WILL_DO     leaves by exception when answered, without waiting
 *                    for the one that removed its entry (a giver?)     turn lost
 * L RAISE_WITH_TURN  leader raises without ending or passing anything  turn lost
 *   LEAD_THEN_SEND   turn taken before a long send (or a sender is
 *                    given the turn): nobody reads while it is stuck   both sides stuck
 * I WATCHER_SLEEPS   watcher does not read for a stuck sender          both sides stuck
 * L COUNT_LEAK       watcher waits for a count of calls in flight that
 *                    a caller leaving by exception does not lower      invalidation never read
 * R POLL_ONLY        watcher looks at the socket, not into the inbox   invalidation never read
 *   WATCHER_FREES    watcher frees the turn and wakes nobody           sleeper forgotten
 * C CHECK_THEN_REG   looks whether the connection is dead, then
 *                    registers (not the other way round)               call without end
 * C MUTE_DEATH       death is noticed but sleepers are not woken       call without end
 * L DROP_EFFECT      a caller that leaves takes its request along      effects lost
 * C CLOSE_EARLY      the watcher closes the descriptor when dead is
 *                    set, and frees the turn again                     read from a closed one
 * C CLOSE_NOW        close() closes the descriptor at once             closed under a reader
 *   TWO_WAKERS       waking without removing the entry first           turn given to one who left
 *   LOOK_NO_MORE     who sends does not look for requests that were
 *                    left once it has given the lock back              a request is never sent
 * 2 PROMISE_AGAIN    who sends lets others leave theirs also the last
 *                    time                                              a request is never sent
 * B LEAVE_TO_ANYONE  leaves a request to whoever has the sending lock  a request is never sent
 * L BREAK_PROMISE    leaves by exception before it has looked, and the
 *                    connection goes on                                a request is never sent
 */

#ifndef N
#define N 2
#endif
#ifndef CALLS
#define CALLS 2
#endif
#ifndef INV
#define INV 1
#endif
#ifndef ROOM
#define ROOM 1
#endif
#ifndef PARTS
#define PARTS 2
#endif

#define WATCHER N
#define INVAL   N
#define PART    100

chan up   = [ROOM] of { byte };        /* client to server: PART or the caller's number */
chan down = [ROOM] of { byte };        /* server to client: PART, INVAL, or a caller's number */
chan inbox = [ROOM] of { byte };       /* received, not yet dispatched; touched with the turn only */

bit turn;                              /* the lock: held = somebody reads or has been told to */
byte parked[N], request[N];            /* 0, or the number of the caller's call */
bit wake[N], asleep[N], done[N], given[N];
bit patient[N];                        /* this caller never gives up */
bit sending, stuck;                    /* the sending lock; its holder waits for room */
bit relieving;                         /* its holder will look for requests that were left */
bit handed[N];                         /* requests left to whoever sends */
bit dead, shut, hungup, closed;
byte readers, dispatching, ended, inflight;
byte owed, effects;                    /* replies the server sent; those that had their effects */
byte said, heard;                      /* invalidations sent; dispatched */
bit serving[N];
bit deathdone;

#if N == 2
#define parked_any() (parked[0] || parked[1])
#define a_request    (request[0] || request[1])
#define a_handed     (handed[0] || handed[1])
#define sleeper      ((asleep[0] && !wake[0]) || (asleep[1] && !wake[1]))
#else
#define parked_any() (parked[0] || parked[1] || parked[2])
#define a_request    (request[0] || request[1] || request[2])
#define a_handed     (handed[0] || handed[1] || handed[2])
#define sleeper      ((asleep[0] && !wake[0]) || (asleep[1] && !wake[1]) || (asleep[2] && !wake[2]))
#endif

/* ---- waking ---- */

inline wake_if_parked(c, call) {       /* pop the entry of that call; whoever got it wakes */
  atomic { if :: parked[c] && parked[c] == call ->
#ifndef MISTAKE_TWO_WAKERS
                 parked[c] = 0;
#endif
                 assert(!wake[c]); wake[c] = 1
           :: else fi }
}

inline die() {                         /* any thread; safe to do twice */
  dead = 1;
  shut = 1;                            /* socket.shutdown: ends every recv and send */
  do
  :: atomic { a_request ->             /* popitem() until there is none */
       k_ = 0; do :: request[k_] -> break :: else -> k_++ od;
       got_ = request[k_]; request[k_] = 0; done[k_] = 1 }
#ifndef MISTAKE_MUTE_DEATH
     wake_if_parked(k_, got_)
#endif
  :: atomic { !(a_request) -> k_ = 0; got_ = 0; break }
  od
}

/* ---- the turn ---- */

inline leave() {                       /* we hold the turn */
  do
  ::
#ifdef MISTAKE_FREE_AND_GO
     turn = 0; break
#else
     atomic { g_ = N; k_ = 0;          /* popitem(): any entry */
              do :: k_ < N && parked[k_] -> g_ = k_; break
                 :: k_ < N -> k_++
                 :: else -> break od;
              k_ = 0;
              if :: g_ < N -> parked[g_] = 0 :: else fi }
     if :: g_ < N -> given[g_] = 1;
                     atomic { assert(!wake[g_]); wake[g_] = 1; g_ = 0; break }
        :: else ->
           atomic { turn = 0; g_ = 0 }
#ifdef MISTAKE_LOOK_THEN_FREE
           break
#else
           if :: parked_any() ->                        /* parked after we looked: once more */
                 if :: atomic { !turn -> turn = 1 } :: else -> break fi
              :: else -> break fi
#endif
        fi
#endif
  od
}

inline recv() {                        /* one recv: everything there is; the end of the stream otherwise */
  atomic {
    (nempty(down) || hungup || shut) -> assert(!closed);
    if :: shut || empty(down) -> end_ = 1
       :: !shut && nempty(down) -> end_ = 0;
            do :: nempty(down) && nfull(inbox) -> down?m_; inbox!m_
               :: empty(down) || full(inbox) -> break od fi;
    m_ = 0 }
}

inline dispatch() {                    /* one message and all its effects */
  atomic { inbox?m_; assert(dispatching == 0); dispatching = 1 }
  if :: m_ == PART -> skip
     :: m_ == INVAL -> heard++
     :: else ->
        atomic { got_ = request[m_]; request[m_] = 0 }
        if :: got_ -> effects++; done[m_] = 1; wake_if_parked(m_, got_)
           :: else fi
  fi;
  atomic { dispatching = 0; m_ = 0; got_ = 0 }
}

inline begin_reading() { atomic { readers++; assert(readers == 1) } }
inline end_reading()   { readers-- }

/* ---- a calling thread ---- */

proctype caller(byte c)
{
  byte n_, k_, g_, m_, u_, got_, whose;
  bit end_, lead, gone, last;

  do
  :: n_ < CALLS && !gone ->
     n_++;
     inflight++;
#ifdef MISTAKE_CHECK_THEN_REG
     if :: dead -> goto ended_ :: else fi;
     request[c] = n_;
#else
     request[c] = n_;
     if :: dead -> atomic { request[c] = 0; goto ended_ } :: else fi;
#endif

#ifdef MISTAKE_LEAD_THEN_SEND
     if :: atomic { !turn -> turn = 1; lead = 1 } :: else fi;
#endif
     /* send, one frame at a time; holding no turn */
#ifdef WAITING
     do
     ::
        atomic { !sending -> sending = 1; whose = c }
#else
     handed[c] = 1;
     do
     :: atomic { !a_handed -> break }
     :: a_handed ->
#ifdef MISTAKE_LEAVE_TO_ANYONE
        if :: atomic { sending -> break }
           :: !sending fi;
#else
        if :: atomic { relieving -> break }
           :: !relieving fi;
#endif
        atomic { !sending -> sending = 1 }
        if :: relieving = 1
           :: atomic { !handed[c] && N == 2 -> last = 1 }  /* (of three, one would have to take what two left) */
#ifdef MISTAKE_PROMISE_AGAIN
              relieving = 1
#endif
        fi;
        atomic { whose = 0;                        /* one that was left; real senders take all at once */
                 do :: whose < N && handed[whose] -> handed[whose] = 0; break
                    :: whose < N && !handed[whose] -> whose++
                    :: whose == N -> break od }
#endif
        u_ = 1;
        do
        :: whose == N -> break
        :: atomic { whose < N && (dead || shut || hungup) } -> break    /* looked at with the lock held */
        :: atomic { whose < N && !dead && !shut && !hungup && nfull(up) ->
             assert(!closed);
             if :: whose == 0 && u_ < PARTS -> up!PART; u_++
                :: else -> up!whose; break fi }
        :: atomic { whose < N && !dead && !shut && !hungup && full(up) && !stuck -> stuck = 1 }  /* EAGAIN */
        :: !patient[c] && u_ > 1 -> gone = 1; break                         /* half a frame is out */
        od;
        if :: gone -> die() :: else fi;
#ifdef WAITING
        atomic { stuck = 0; sending = 0; u_ = 0; whose = 0 }
        if :: gone -> goto ended_ :: else -> break fi
#else
        relieving = 0;
        atomic { stuck = 0; sending = 0; u_ = 0; whose = 0 }
        if :: gone -> goto ended_
           :: !gone && !patient[c] -> gone = 1;                             /* before it has looked again */
#ifndef MISTAKE_BREAK_PROMISE
              die();
#endif
              goto ended_
           :: atomic { !gone && last -> last = 0; break }
           :: !gone && !last fi;
#ifdef MISTAKE_LOOK_NO_MORE
        break
#endif
#endif
     od;
     /* a failed send is not looked at here: whoever reads finds the end of the stream */

     /* wait */
     if :: lead -> goto reading :: else fi;
     if :: atomic { !turn -> turn = 1; lead = 1 }
        :: else ->
           parked[c] = n_;
#ifndef MISTAKE_PARK_BLINDLY
           if :: done[c] -> atomic { if :: parked[c] -> parked[c] = 0; goto answered
                                        :: else fi }      /* claimed: sleep, it is being woken */
              :: else ->
                 if :: atomic { !turn -> turn = 1; lead = 1 } parked[c] = 0; goto reading
                    :: else fi
           fi;
#endif
           atomic { asleep[c] = 1 }
           if :: atomic { wake[c] -> wake[c] = 0; asleep[c] = 0 }
              :: atomic { !patient[c] -> asleep[c] = 0; gone = 1 }    /* time-out, KeyboardInterrupt */
           fi;
           if :: gone ->
#ifdef MISTAKE_DROP_EFFECT
                 request[c] = 0;
#endif
                 atomic { if :: parked[c] -> parked[c] = 0; got_ = 1 :: else -> got_ = 0 fi }
#ifndef MISTAKE_KEEP_GIFT
                 if :: got_ -> skip
                    :: else ->                            /* claimed: its claimer is a step away */
#ifdef MISTAKE_DONE_WILL_DO
                       (given[c] || done[c]);
#else
                       (wake[c]);
#endif
                       if :: given[c] -> leave() :: else fi
                 fi;
#endif
                 goto ended_
              :: else fi;
           lead = given[c];
           if :: !lead -> assert(done[c]); goto answered :: else fi
     fi;

reading:
     begin_reading();
     do
     :: done[c] -> break
     :: else ->
        if
        :: nempty(inbox) -> dispatch()
        :: empty(inbox) ->
           if :: recv();
                 if :: end_ -> end_reading(); die(); goto dying :: else fi
              :: !patient[c] -> gone = 1; break                       /* clean: nothing was consumed */
              :: !patient[c] -> gone = 1;                              /* in the middle of a message */
                 end_reading();
#ifdef MISTAKE_RAISE_WITH_TURN
                 goto ended_;
#endif
                 die(); goto dying
           fi
        fi
     od;
     end_reading();
dying:
     leave();
answered:
     skip;
ended_:
     atomic { lead = 0; last = 0; got_ = 0; end_ = 0; k_ = 0; g_ = 0; m_ = 0; given[c] = 0; wake[c] = 0; done[c] = 0 }
#ifdef MISTAKE_COUNT_LEAK
     if :: gone -> skip :: else -> inflight-- fi
#else
     inflight--
#endif
  :: else -> break
  od;
  ended++
}

/* ---- the watcher ---- */

#ifdef MISTAKE_COUNT_LEAK
#define nobody_calls (inflight == 0)
#else
#define nobody_calls (!sleeper)        /* the real one: no call since its last look, a few ms ago */
#endif
#ifdef MISTAKE_WATCHER_SLEEPS
#define wanted nobody_calls && !sending
#else
#define wanted (stuck || nobody_calls)
#endif

proctype watcher()
{
  byte k_, g_, m_, got_;
  bit end_, busy;
end_resting:
  do
#ifdef MISTAKE_CLOSE_EARLY
  :: atomic { dead && !turn && !sending -> turn = 1 } closed = 1; turn = 0; break
#else
  :: atomic { dead && !turn -> turn = 1 }       /* and keeps it: nobody reads from here on */
     die();                                     /* whoever began to end it need not have ended yet */
     atomic { !sending -> assert(readers == 0); closed = 1 } break
#endif
  :: atomic { !dead && !turn && (wanted) && ended < N -> turn = 1 } -> goto taken
  :: atomic { !dead && !turn && (wanted) && ended == N && (nempty(down) || hungup
#ifndef MISTAKE_POLL_ONLY
        || nempty(inbox)
#endif
        ) -> turn = 1 } -> goto taken       /* (when all is over it need not be shown spinning) */
  od;
  goto out;
taken:
  begin_reading();
  busy = 0;
  do
#ifdef MISTAKE_POLL_ONLY
  :: !busy -> recv(); if :: end_ -> break :: else -> busy = 1 fi
  :: busy && nempty(inbox) -> dispatch()
  :: busy && empty(inbox) -> break
#else
  :: nempty(inbox) -> dispatch(); busy = 1
  :: empty(inbox) && (!busy || stuck) -> end_ = 0; recv(); if :: end_ -> break :: else fi
  :: empty(inbox) && busy && !stuck -> break
#endif
  od;
  end_reading();
  if :: end_ -> end_ = 0; die() :: else fi;
#ifdef MISTAKE_WATCHER_FREES
  turn = 0;
#else
  leave();
#endif
  goto end_resting;
out:
  deathdone = 1
}

/* ---- the other side ---- */

inline put(x) {                        /* the server's blocking send of one unit */
  if :: atomic { !shut && nfull(down) -> down!x }
     :: atomic { shut -> goto gone } fi
}

proctype server(bit mortal)
{
  byte c, i;
end_serving:
  do
  :: atomic { up?c -> if :: c == PART -> skip :: else -> serving[c] = 1 fi; c = 0 }
  :: atomic { serving[0] -> serving[0] = 0; c = 0 } goto answer
  :: atomic { serving[1] -> serving[1] = 0; c = 1 } goto answer
#if N > 2
  :: atomic { serving[2] -> serving[2] = 0; c = 2 } goto answer
#endif
  :: said < INV -> put(INVAL); said++
  :: atomic { mortal -> hungup = 1; goto gone }
  :: shut -> goto gone
  od;
answer:
  i = 1;
  do :: i < PARTS -> put(PART); i++ :: else -> break od;
  put(c);
  atomic { owed++; c = 0; i = 0; goto end_serving }
gone:
  skip
}

proctype beater()
{
  byte i;
  do :: i < 2 -> atomic { !sending -> sending = 1; i++ } sending = 0 :: else -> break od;
  i = 0
}

proctype closer()
{
  byte k_, got_;
  die();
#ifdef MISTAKE_CLOSE_NOW
  atomic { assert(readers == 0); closed = 1 }
#endif
  k_ = 0
}

init {
  bit mortal;
  atomic {
    byte i = 0;
    do :: i < N -> patient[i] = 1; i++ :: else -> break od;
#ifdef LEAVING
    i = 0;
    do :: i < N -> if :: patient[i] = 1 :: patient[i] = 0 fi; i++ :: else -> break od;
#endif
#ifdef DYING
    if :: mortal = 1 :: mortal = 0 fi;
#endif
#ifdef CLOSING
    if :: run closer() :: skip fi;
#endif
#ifdef BEATING
    run beater();
#endif
    run server(mortal);
    run watcher();
    i = 0;
    do :: i < N -> run caller(i); i++ :: else -> break od;
    i = 0
  }
  /* the end: nothing more can happen */
  timeout ->
    assert(ended == N);
    assert(dead || !hungup);
    assert(readers == 0 || !dead);
    assert(dead || (heard == said && effects == owed && empty(down) && empty(inbox)));
    assert(!dead || (deathdone && closed))
}
