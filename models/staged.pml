/* staged: an all_reduce passes through the ranks' stages block by block; its steps (give, reduce, take)
   run ahead of each other as far as the others' counts allow, in any order.
   csrc/cpu/staged.cc: may_give(), may_reduce(), may_take(), publish(), reached().

   holds
   refuted  -DRELAXED_GIVEN     a count is seen before the block it counts
   refuted  -DRELAXED_REDUCED
   refuted  -DNO_TAKEN_WAIT     a slot is written again before the others have taken what was in it
   refuted  -DONE_TOO_EARLY     likewise by one block */
#define NP 2
#define RANKS 2
#define SLOTS 2
#define BLOCKS 4
#define slot(rank, block, piece) (((rank) * SLOTS + (block) % SLOTS) * RANKS + (piece))
#define given(rank) (8 + (rank))
#define reduced(rank) (10 + (rank))
#define taken(rank) (12 + (rank))
#define NV 14
#include "memory.pml"

#define INPUT(rank, block, piece) ((block) * 16 + (piece) * 8 + (rank) + 1)
#define SUM(block, piece) (INPUT(0, block, piece) + INPUT(1, block, piece))
#ifdef ONE_TOO_EARLY
#define NEEDED(block) ((block) - SLOTS)
#else
#define NEEDED(block) ((block) - SLOTS + 1)
#endif

active [RANKS] proctype rank() {
  byte me = _pid - 1;
  byte other = 1 - (_pid - 1);
  byte my_given = 0, my_reduced = 0, my_taken = 0, count, value;
  do
  :: my_given < BLOCKS ->
     load(me, taken(other), count);
     if
#ifdef NO_TAKEN_WAIT
     :: true ->
#else
     :: my_given < SLOTS || count >= NEEDED(my_given) ->
#endif
        store_relaxed(me, slot(me, my_given, other), INPUT(me, my_given, other));
        my_given++;
#ifdef RELAXED_GIVEN
        store_relaxed(me, given(me), my_given)
#else
        store_release(me, given(me), my_given)
#endif
     :: else
     fi
  :: my_reduced < my_given ->
     load(me, given(other), count);
     if
     :: count > my_reduced ->
        load(me, slot(other, my_reduced, me), value);
        assert(value == INPUT(other, my_reduced, me));
        store_relaxed(me, slot(me, my_reduced, me), value + INPUT(me, my_reduced, me));
        my_reduced++;
#ifdef RELAXED_REDUCED
        store_relaxed(me, reduced(me), my_reduced)
#else
        store_release(me, reduced(me), my_reduced)
#endif
     :: else
     fi
  :: my_taken < my_reduced ->
     load(me, reduced(other), count);
     if
     :: count > my_taken ->
        load(me, slot(other, my_taken, other), value);
        assert(value == SUM(my_taken, other));
        my_taken++;
        store_release(me, taken(me), my_taken)
     :: else
     fi
  :: my_taken == BLOCKS -> break
  od
}
