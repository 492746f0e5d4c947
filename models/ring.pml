/* ring: bytes between two ranks in a ring of shared memory arrive whole and in order.
   csrc/cpu/shm_channel.cc: write(), readable(), consume().

   holds
   refuted  -DRELAXED_TAIL   the tail is seen before the bytes it stands for
   refuted  -DEARLY_HEAD     the head says that bytes were read before they are (what a relaxed store allows)
   refuted  -DTOO_FULL       one more byte than the ring has room for */
#define NP 2
#define NV 4
#define tail 2
#define head 3
#define SIZE 2
#define BYTES 5
#include "memory.pml"
#ifdef TOO_FULL
#define ROOM (SIZE + 1)
#else
#define ROOM SIZE
#endif

active proctype producer() {
  byte my_tail = 0, seen_head = 0;
  do
  :: my_tail < BYTES ->
     do
     :: my_tail - seen_head < ROOM -> break
     :: else -> load(0, head, seen_head)
     od;
     store_relaxed(0, my_tail % SIZE, my_tail + 1);
     my_tail++;
#ifdef RELAXED_TAIL
     store_relaxed(0, tail, my_tail)
#else
     store_release(0, tail, my_tail)
#endif
  :: else -> break
  od
}

active proctype consumer() {
  byte my_head = 0, seen_tail = 0, value;
  do
  :: my_head < BYTES ->
     do
     :: seen_tail > my_head -> break
     :: else -> load(1, tail, seen_tail)
     od;
#ifdef EARLY_HEAD
     store_relaxed(1, head, my_head + 1);
#endif
     load(1, my_head % SIZE, value);
     assert(value == my_head + 1);
     my_head++;
     store_release(1, head, my_head)
  :: else -> break
  od
}
