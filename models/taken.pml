/* taken: root and receiver of a broadcast share its blocks, each taking the next that nobody has. One
   word, the receiver's, serves one broadcast after another.
   csrc/cpu/direct.cc: plan(), copy_block().

   holds
   refuted  -DNO_DONE_WAIT      the root still takes blocks when the receiver begins the next
   refuted  -DLATE_RESET        the word is set after the receiver's entry
   refuted  -DTORN_TAKE         load and store instead of a read-modify-write */
#define NP 2
#define NV 10
#define entry(rank) (rank)
#define done(rank) (2 + (rank))
#define taken 4
#define data(b) (5 + (b))
#define BLOCKS 2
#define BROADCASTS 2
#define ROOT 0
#define RECEIVER 1
#include "memory.pml"

byte moved[BLOCKS * BROADCASTS];

#ifdef TORN_TAKE
#define take(p, b) load(p, taken, b); store_relaxed(p, taken, b + 1)
#else
#define take(p, b) fetch_add_relaxed(p, taken, 1, b)
#endif

inline share(me, other, k) {
  do
  :: load(me, entry(other), value);
     if :: value >= k -> break :: else fi
  od;
  do
  :: take(me, value);
     if
     :: value < BLOCKS ->
        moved[(k - 1) * BLOCKS + value]++;
        assert(moved[(k - 1) * BLOCKS + value] == 1);
        store_relaxed(me, data(value), k)
     :: else -> break
     fi
  od;
  store_release(me, done(me), k)
}

active proctype root() {
  byte k = 0, value;
  do
  :: k < BROADCASTS ->
     k++;
     store_release(ROOT, entry(ROOT), k);
     share(ROOT, RECEIVER, k);
     do
     :: load(ROOT, done(RECEIVER), value);
        if :: value >= k -> break :: else fi
     od
  :: else -> break
  od
}

active proctype receiver() {
  byte k = 0, value;
  do
  :: k < BROADCASTS ->
     k++;
#ifdef LATE_RESET
     store_release(RECEIVER, entry(RECEIVER), k);
     store_relaxed(RECEIVER, taken, 0);
#else
     store_relaxed(RECEIVER, taken, 0);
     store_release(RECEIVER, entry(RECEIVER), k);
#endif
     share(RECEIVER, ROOT, k);
#ifndef NO_DONE_WAIT
     do
     :: load(RECEIVER, done(ROOT), value);
        if :: value >= k -> break :: else fi
     od;
     load(RECEIVER, data(0), value);
     assert(value == k);
     load(RECEIVER, data(1), value);
     assert(value == k)
#endif
  :: else -> break
  od
}
