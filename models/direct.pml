/* direct: ranks at work in each other's memory, one collective after another. A rank returns, and uses
   its memory for other things, once nobody is at work in it; what the others wrote has arrived.
   csrc/cpu/direct.cc: begin(), advance(), publish_done(), done(). Each rank's input and output are one
   word each; rank i reads every input and writes its result into every output's word i.

   holds
   refuted  -DNO_DONE_WAIT    the memory is used again while others read it
   refuted  -DRELAXED_DONE    "done" is seen before what was written
   refuted  -DRELAXED_ENTRY   an input is read before it stands */
#define NP 2
#define RANKS 2
#define COLLECTIVES 2
#define entry(rank, k) ((rank) * 2 + (k) % 2)
#define input(rank) (4 + (rank))
#define output(rank, from) (6 + (rank) * 2 + (from))
#define done(rank) (10 + (rank))
#define NV 12
#include "memory.pml"

#define CONTRIBUTION(rank, k) ((k) * 10 + (rank) + 1)
#define RESULT(k) (CONTRIBUTION(0, k) + CONTRIBUTION(1, k))

active [RANKS] proctype rank() {
  byte me = _pid - 1;
  byte other = 1 - (_pid - 1);
  byte k = 0, value, sum;
  do
  :: k < COLLECTIVES ->
     k++;
     store_relaxed(me, input(me), CONTRIBUTION(me, k));  /* the caller's */
     store_relaxed(me, output(me, other), 0);
#ifdef RELAXED_ENTRY
     store_relaxed(me, entry(me, k), k);
#else
     store_release(me, entry(me, k), k);
#endif
     do
     :: load(me, entry(other, k), value);
        if :: value == k -> break :: else fi
     od;
     load(me, input(me), sum);
     load(me, input(other), value);
     assert(value == CONTRIBUTION(other, k));
     sum = sum + value;
     store_relaxed(me, output(other, me), sum);
#ifdef RELAXED_DONE
     store_relaxed(me, done(me), k);
#else
     store_release(me, done(me), k);
#endif
#ifndef NO_DONE_WAIT
     do
     :: load(me, done(other), value);
        if :: value >= k -> break :: else fi
     od;
#endif
     load(me, output(me, other), value);  /* the caller's again */
     assert(value == RESULT(k))
  :: else -> break
  od
}
