/* verdict: whoever finds a circle leaves word for the ranks in it, each in its line: which of its
   waits is in a circle, and in which. Two may find one at a time, and not the same; they may come
   late, when that wait is over and the next has begun. A rank is told, in whole words that are of its
   own wait.
   csrc/cpu/standstill.cc: claim(), look(), verdict().

   holds
   refuted  -DNO_CLAIM          each writes as it comes: words of two circles are mixed
   refuted  -DNO_ORDER          who comes late takes the line from the next: wrong words, or none
   refuted  -DNO_TURN           who has begun, and is late, still writes with the next
   refuted  -DNO_COMPARE        words of a wait that is over are taken for this one's
   refuted  -DRELAXED_VERDICT   the words are not there yet */
#define NP 3
#define NV 4
#define epoch 0
#define condemned 1  /* as in the code: epoch * 2 while the verdict is written, then epoch * 2 + 1 */
#define word(i) (2 + (i))
#define LAST 3
#include "memory.pml"

#ifdef RELAXED_VERDICT
#define publish store_relaxed
#else
#define publish store_release
#endif

/* Its first wait may end without a verdict, as when what it waited for breaks; the last does not. */
active proctype rank() {
  byte mine = 1, value, first, second;
  do
  :: mine <= LAST ->
     store_release(0, epoch, mine);
     if
#ifdef NO_COMPARE
     :: mem[condemned] & 1 ->
#else
     :: mem[condemned] == mine * 2 + 1 ->
#endif
        load(0, word(0), first);
        load(0, word(1), second);
        assert(first == second);
        assert(first % 16 == mine)
     :: mine < LAST
     fi;
     store_release(0, epoch, mine + 1);
     mine = mine + 2
  :: else -> break
  od
}

proctype finder(byte me) {
  byte found = 1, value;
  bool won;
  do
  :: found <= LAST ->
     load(me, epoch, value);
     if
     :: value == found ->
        won = false;
#ifdef NO_CLAIM
        won = true;
#else
        do
        :: load(me, condemned, value);
           if
#ifdef NO_ORDER
           :: value / 2 == found -> break
#else
           :: value >= found * 2 -> break
#endif
#ifdef NO_TURN
           :: else ->
#else
           :: else -> if :: value == 0 || value % 2 == 1 :: value > 0 && value % 2 == 0 -> goto again fi;
#endif
              compare_exchange_acq_rel(me, condemned, value, found * 2, won);
              if :: won -> break :: else fi
           fi;
again:
           skip
        od;
#endif
        if
        :: won ->
           store_release(me, word(0), me * 16 + found);
           store_release(me, word(1), me * 16 + found);
           publish(me, condemned, found * 2 + 1)
        :: else
        fi;
        found = found + 2
     :: value > found -> found = found + 2
     :: value < found
     :: found < LAST -> found = found + 2
     fi
  :: else -> break
  od
}

init { atomic { run finder(1); run finder(2) } }
