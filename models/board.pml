/* board: slots used in turn, each again once every rank has entered the collective after the one it
   was used for, and its owner has seen that all called the same in that one. Who only gives does not
   wait: roots run ahead. Nobody reads what is overwritten, and no mismatch is overlooked.
   csrc/cpu/board.cc: has_room(), publish(), root_entered(), all_agree(), finish().

   Two slots and three broadcasts, the first from rank 0, the others from any. With -DMISMATCH ranks 0 and 1 each take themselves for
   the root of the first, so that neither waits for the other in it: one of them must find out before
   both use its slot again.

   holds
   holds    -DTSO
   holds    -DMISMATCH
   holds    -DMISMATCH -DTSO
   refuted  -DNO_ROOM              a fast root overwrites what a slow rank still reads
   refuted  -DROOM_TOO_EARLY       likewise: the ranks have entered the collective, not the one after it
   refuted  -DRELAXED_FLAG         the flag is seen before the contribution
   refuted  -DMISMATCH -DNO_LOOK   nobody compares with those it does not wait for
   refuted  -DNO_WORD              a hash that is just being overwritten is taken for a mismatch */
#define NP 3
#define RANKS 3
#define COLLECTIVES 3
#define payload(rank, k) ((rank) * 6 + (k) % 2)
#define flag(rank, k) ((rank) * 6 + 2 + (k) % 2)
#define hash(rank, k) ((rank) * 6 + 4 + (k) % 2)
#define NV (RANKS * 6)
#include "memory.pml"

byte roots[COLLECTIVES + 1];
bool found;     /* a mismatch: every rank stops */
byte reused;    /* how many of ranks 0 and 1 use the slot of the first collective again */

#ifdef MISMATCH
#define ROOT(rank, k) ((k) == 1 -> ((rank) == 2 -> roots[1] : (rank)) : roots[k])
#else
#define ROOT(rank, k) roots[k]
#endif
#define HASH(rank, k) ((k) * 10 + ROOT(rank, k))
#define CONTRIBUTION(rank, k) ((k) * 10 + (rank))
#define differ(a, b, k) (HASH(a, k) != HASH(b, k)) /* as their announcements say, which stay longer */

#define await_entered(rank, k)                     \
  do                                               \
  :: found -> goto stopped                         \
  :: !found ->                                     \
     load(me, flag(rank, k), value);               \
     if :: value >= (k) -> break :: else fi        \
  od

proctype rank(byte me) {
  byte k = 0, other, value, root;
  do
  :: k < COLLECTIVES ->
     k++;
     root = ROOT(me, k);
#ifndef NO_ROOM
     if
     :: k > 2 ->
        other = 0;
        do
        :: other < RANKS ->
#ifdef ROOM_TOO_EARLY
           await_entered(other, k - 2);
#else
           await_entered(other, k - 1);
#endif
           other++
        :: else -> break
        od;
#ifndef NO_LOOK
        other = 0;
        do
        :: other < RANKS ->
           do
           :: found -> goto stopped
           :: !found ->
              load(me, flag(other, k - 2), value);
              if :: value != k - 2 -> break :: else fi;
              load(me, hash(other, k - 2), value);
              if
              :: value == HASH(me, k - 2) -> break
              :: else ->
#ifdef NO_WORD
                 assert(differ(me, other, k - 2));
#endif
                 if :: differ(me, other, k - 2) -> found = true; goto stopped :: else fi
              fi
           od;
           other++
        :: else -> break
        od
#endif
     :: else
     fi;
#endif
     if :: k == 3 && me < 2 -> reused++ :: else fi;
#ifdef MISMATCH
     assert(reused < 2);
#endif
     if :: me == root -> store_relaxed(me, payload(me, k), CONTRIBUTION(me, k)) :: else fi;
     store_relaxed(me, hash(me, k), HASH(me, k));
#ifdef RELAXED_FLAG
     store_relaxed(me, flag(me, k), k);
#else
     store_release(me, flag(me, k), k);
#endif
     if
     :: me != root ->
        await_entered(root, k);
        load(me, hash(root, k), value);
        if :: value != HASH(me, k) -> found = true; goto stopped :: else fi;
        load(me, payload(root, k), value);
        assert(value == CONTRIBUTION(root, k))
     :: else
     fi
  :: else -> break
  od;
stopped:
}

init {
  byte k = 2;  /* roots[1] is 0: ranks are alike */
  atomic {
    do
    :: k <= COLLECTIVES -> if :: roots[k] = 0 :: roots[k] = 1 :: roots[k] = 2 fi; k++
    :: else -> break
    od;
    k = 0;
    do
    :: k < RANKS -> run rank(k); k++
    :: else -> break
    od
  }
}
