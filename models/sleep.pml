/* sleep: who publishes rings only those who sleep; nobody sleeps through what was published.
   csrc/cpu/endpoint.cc: ring(), prepare_sleep(), sleep().

   holds
   holds    -DTSO
   refuted  -DNO_RING_FENCE            the store and the look at the sleeper swap: both sides miss each other
   refuted  -DNO_RING_FENCE -DTSO      x86 swaps them as well
   refuted  -DNO_SLEEP_FENCE           likewise the announcement and the re-check (not on x86, where the
                                       announcement is a locked instruction)
   refuted  -DNO_RECHECK */
#define NP 2
#define NV 2
#define published 0
#define sleepers 1
#define ROUNDS 2
#include "memory.pml"

chan doorbell = [1] of { bit };  /* an eventfd: rung or not */

active proctype publisher() {
  byte round = 0, asleep;
  do
  :: round < ROUNDS ->
     round++;
     store_release(0, published, round);
#ifndef NO_RING_FENCE
     fence(0);
#endif
     load(0, sleepers, asleep);
     if
     :: asleep > 0 -> atomic { if :: nfull(doorbell) -> doorbell!1 :: full(doorbell) fi }
     :: else
     fi
  :: else -> break
  od
}

active proctype waiter() {
  byte seen = 0, now, was;
  do
  :: load(1, published, now);
     if
     :: now > seen -> seen = now; if :: seen == ROUNDS -> break :: else fi
     :: else ->  /* spun and yielded for long enough */
#ifdef NO_SLEEP_FENCE
        load(1, published, now);
        fetch_add_relaxed(1, sleepers, 1, was);
#else
        fetch_add_relaxed(1, sleepers, 1, was);
        fence(1);
        load(1, published, now);
#endif
#ifdef NO_RECHECK
        now = seen;
#endif
        if
        :: now > seen
        :: else -> doorbell?_  /* the real one wakes after 5 ms in any case; here that would hide what is lost */
        fi;
        fetch_add_relaxed(1, sleepers, 255, was)
     fi
  od
}
