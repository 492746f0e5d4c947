/* rendezvous: a large message goes from the sender's memory to the receiver's in blocks that both sides
   take; the sender may withdraw what was not accepted, the receiver refuse it; a record carries one
   message after another.
   csrc/cpu/rendezvous.cc: offer(), withdraw(), accept(), move_block(), advance_send(), advance_recv().

   holds
   refuted  -DRELAXED_SENT      the receiver returns before the sender's blocks have arrived
   refuted  -DEARLY_SEND_END    the sender returns, and uses its memory, while the receiver reads it
   refuted  -DPLAIN_WITHDRAW    withdrawing without a compare-exchange: both sides think that they won
   refuted  -DNO_FREE_CHECK     the record is used again before the receiver is done with it */
#define NP 2
#define NV 10
#define state 0
#define taken 1
#define sent 2
#define received 3
#define lane 4
#define source(b) (5 + (b))
#define target(b) (7 + (b))
#define address 9
#define BLOCKS 2
#define MESSAGES 2
#define SENDER 0
#define RECEIVER 1
#define OFFERED(use) ((use) * 4)
#define ACCEPTED(use) ((use) * 4 + 1)
#define WITHDRAWN(use) ((use) * 4 + 2)
#include "memory.pml"

bool took_back[MESSAGES + 1], took[MESSAGES + 1];
#define GONE 200

active proctype sender() {
  byte use = 0, value, b;
  bool won;
  do
  :: use < MESSAGES ->
#ifndef NO_FREE_CHECK
     do
     :: load(SENDER, received, value);
        if :: value == use -> break :: else fi
     od;
#endif
     use++;
     store_relaxed(SENDER, source(0), use);
     store_relaxed(SENDER, source(1), use);
     store_relaxed(SENDER, taken, 0);
     store_relaxed(SENDER, state, OFFERED(use));
     store_release(SENDER, lane, use);
     do
     :: load(SENDER, state, value);
        if
        :: value == ACCEPTED(use) -> break
        :: else ->
           if
           :: true
           :: true ->  /* its deadline */
#ifdef PLAIN_WITHDRAW
              load(SENDER, state, value);
              won = (value == OFFERED(use));
              if :: won -> store_release(SENDER, state, WITHDRAWN(use)) :: else fi;
#else
              compare_exchange_acq_rel(SENDER, state, OFFERED(use), WITHDRAWN(use), won);
#endif
              if
              :: won -> took_back[use] = true; assert(!took[use]); goto returned
              :: else
              fi
           fi
        fi
     od;
     do
     :: fetch_add_relaxed(SENDER, taken, 1, b);
        if
        :: b < BLOCKS -> store_relaxed(SENDER, target(b), use)
        :: else -> break
        fi
     od;
#ifdef RELAXED_SENT
     store_relaxed(SENDER, sent, use);
#else
     store_release(SENDER, sent, use);
#endif
#ifndef EARLY_SEND_END
     do
     :: load(SENDER, received, value);
        if :: value == use -> break :: else fi
     od;
#endif
returned:
     store_relaxed(SENDER, source(0), GONE);  /* the memory is the caller's again */
     store_relaxed(SENDER, source(1), GONE)
  :: else -> break
  od
}

active proctype receiver() {
  byte use = 0, value, b;
  bool won, refuses;
  do
  :: use < MESSAGES ->
     use++;
     do
     :: load(RECEIVER, lane, value);
        if :: value >= use -> break :: else fi
     od;
     if :: refuses = false :: refuses = true fi;
     if
     :: refuses -> store_relaxed(RECEIVER, taken, 100)
     :: else
     fi;
     store_relaxed(RECEIVER, target(0), 0);
     store_relaxed(RECEIVER, target(1), 0);
     compare_exchange_acq_rel(RECEIVER, state, OFFERED(use), ACCEPTED(use), won);
     if
     :: won -> took[use] = true; assert(!took_back[use])
     :: else
     fi;
     if
     :: !won || refuses -> store_release(RECEIVER, received, use)
     :: else ->
        do
        :: fetch_add_relaxed(RECEIVER, taken, 1, b);
           if
           :: b < BLOCKS ->
              load(RECEIVER, source(b), value);
              assert(value == use);
              store_relaxed(RECEIVER, target(b), value)
           :: else -> break
           fi
        od;
        do
        :: load(RECEIVER, sent, value);
           if :: value == use -> break :: else fi
        od;
        load(RECEIVER, target(0), value);
        assert(value == use);
        load(RECEIVER, target(1), value);
        assert(value == use);
        store_release(RECEIVER, received, use)
     fi
  :: else -> break
  od
}
