/* board: two slots a rank, used in turn, are enough for one native collective after another.
   csrc/cpu/board.cc: publish(), all_entered(), finish().

   holds
   refuted  -DONE_SLOT       a fast rank overwrites what a slow one still reads
   refuted  -DRELAXED_FLAG   the flag is seen before the contribution */
#define NP 3
#define RANKS 3
#define COLLECTIVES 3
#ifdef ONE_SLOT
#define SLOT(k) 0
#else
#define SLOT(k) ((k) % 2)
#endif
#define payload(rank, k) ((rank) * 2 + SLOT(k))
#define flag(rank, k) (RANKS * 2 + (rank) * 2 + SLOT(k))
#define NV (RANKS * 4)
#include "memory.pml"

#define CONTRIBUTION(rank, k) ((k) * 10 + (rank))

active [RANKS] proctype rank() {
  byte me = _pid - 1;  /* 0 is memory() */
  byte k = 0, other, value;
  do
  :: k < COLLECTIVES ->
     k++;
     store_relaxed(me, payload(me, k), CONTRIBUTION(me, k));
#ifdef RELAXED_FLAG
     store_relaxed(me, flag(me, k), k);
#else
     store_release(me, flag(me, k), k);
#endif
     other = 0;  /* every flag first, as all_entered() does */
     do
     :: other < RANKS ->
        do
        :: load(me, flag(other, k), value);
           if :: value == k -> break :: else fi
        od;
        other++
     :: else -> break
     od;
     other = 0;
     do
     :: other < RANKS ->
        load(me, payload(other, k), value);
        assert(value == CONTRIBUTION(other, k));
        other++
     :: else -> break
     od
  :: else -> break
  od
}
