/* reach: a rank that gives up (a deadline, close()) may use its memory for other things as soon as it
   returns; no write of another rank lands in it after that.
   csrc/cpu/reach.cc: write(), retire(). One of writer and owner sees the other (Dekker).

   holds
   holds    -DTSO
   refuted  -DNO_WRITE_FENCE           the writer's flag is seen after its look at the owner
   refuted  -DNO_WRITE_FENCE -DTSO
   refuted  -DNO_RETIRE_FENCE          likewise the owner's word and its look at the flag
   refuted  -DNO_RETIRE_FENCE -DTSO
   refuted  -DNO_LOOK                  blocks go on without a look at the owner
   refuted  -DRELAXED_END              the flag falls before the block has arrived */
#define NP 2
#define NV 3
#define writing 0
#define closed 1
#define block 2
#define BLOCKS 2
#include "memory.pml"

active proctype writer() {
  byte i = 0, gone;
  do
  :: i < BLOCKS ->
     store_relaxed(0, writing, 1);
#ifndef NO_WRITE_FENCE
     fence(0);
#endif
     load(0, closed, gone);
#ifdef NO_LOOK
     gone = 0;
#endif
     if
     :: gone == 0 -> store_relaxed(0, block, i + 1)
     :: else
     fi;
#ifdef RELAXED_END
     store_relaxed(0, writing, 0);
#else
     store_release(0, writing, 0);
#endif
     if :: gone -> break :: else fi;
     i++
  :: else -> break
  od
}

active proctype owner() {
  byte busy, value;
  store_release(1, closed, 1);
#ifndef NO_RETIRE_FENCE
  fence(1);
#endif
  do
  :: load(1, writing, busy);
     if :: busy == 0 -> break :: else fi
  od;
  store_relaxed(1, block, 99);  /* the memory is the owner's alone */
  fence(1);
  do
  :: load(1, block, value);
     assert(value == 99);
     if :: n_stores[0] == 0 -> break :: true fi
  od
}
