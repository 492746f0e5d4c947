/* entry: of the ranks that enter a collective over the board only the last wakes the others, and
   nobody sleeps for ever. csrc/cpu/board.cc: publish(); csrc/cpu/endpoint.cc: ring_others(),
   prepare_sleep(), sleep(). Three ranks: one that sleeps, two that enter at the same time.

   holds
   holds    -DTSO
   refuted  -DNO_ENTRY_FENCE            two that come at once miss each other's lines: nobody rings
   refuted  -DNO_ENTRY_FENCE -DTSO      x86 lets a load pass the store before it as well
   refuted  -DNO_RECHECK */
#define NP 3
#define NV 4
#define sleepers 3  /* 0, 1, 2: the ranks' lines */
#include "memory.pml"

chan doorbell = [1] of { bit };

/* Rank 0 has entered, and waits for the lines of 1 and 2. */
active proctype sleeper() {
  byte one, two, was;
  do
  :: load(0, 1, one);
     load(0, 2, two);
     if
     :: one && two -> break
     :: else ->
        fetch_add_relaxed(0, sleepers, 1, was);
        fence(0);
        load(0, 1, one);
        load(0, 2, two);
#ifdef NO_RECHECK
        one = 0;
#endif
        if
        :: one && two
        :: else -> doorbell?_  /* the real one wakes after 5 ms in any case */
        fi;
        fetch_add_relaxed(0, sleepers, 255, was)
     fi
  od
}

proctype enters(byte me) {
  byte other, asleep;
  store_release(me, me, 1);
#ifndef NO_ENTRY_FENCE
  fence(me);
#endif
  load(me, 3 - me, other);  /* rank 0's line is in already */
  if
  :: other ->
#ifndef NO_ENTRY_FENCE
     fence(me);
#endif
     load(me, sleepers, asleep);
     if
     :: asleep > 0 -> atomic { if :: nfull(doorbell) -> doorbell!1 :: full(doorbell) fi }
     :: else
     fi
  :: else
  fi
}

init {
  run enters(1);
  run enters(2)
}
