/* standstill: a rank that follows the words of ranks which wait in other groups, back to itself, has
   found a circle of waits in which none can go on.
   csrc/cpu/standstill.cc: enter(), leave(), wait_for(), look(); csrc/cpu/failure.cc:
   look_for_standstill().

   Every rank makes CALLS calls, each in either of two groups, and waits in it for some of the others,
   or for none; of three ranks for one at most. While it waits it may look at any
   time, any number of times, for any rank it waits for.

   holds
   holds    -DTHREE
   holds    -DLONGER
   refuted  -DLONGER -DNO_SECOND_LOOK  the words of a rank's next wait follow what was said of its last
   refuted  -DEDGE_FIRST       it entered, and then waits in the epoch that is read after that
   refuted  -DSHORTER -DRELAXED_EPOCH  the epoch is seen before what its rank had entered
   refuted  -DLONGER -DNO_EPOCHS      a rank that waits is taken to wait as it did when that was said of it
   refuted  -DLONGER -DONE_EPOCH      two waits in one epoch, as of a callback that calls within a wait */
#ifdef THREE
#define NP 3
#define CALLS (me == 0 -> 2 : 1)
#elif defined(LONGER)
#define NP 2
#define CALLS 3
#elif defined(SHORTER)
#define NP 2
#define CALLS 1
#else
#define NP 2
#define CALLS 2
#endif
#define GROUPS 2
#define epoch(rank) ((rank) * 5)
#define edge(rank) ((rank) * 5 + 1)
#define what(rank) ((rank) * 5 + 2)
#define entered(rank, group) ((rank) * 5 + 3 + (group))
#define NV (NP * 5)
#define EDGE(place, epoch) ((place) * 16 + (epoch))
#define WHAT(group, sequence) ((group) * 16 + (sequence))
#include "memory.pml"
#if defined(THREE) || defined(LONGER)  /* stores are seen at once, for fewer states */
#undef put
#define put(p, v, x, releases) mem[v] = x
#endif

/* What is so, whatever is seen of it. */
byte calls_in[NP * GROUPS];
byte waits_for[NP];  /* a bit for each rank */
byte waits_in[NP];   /* WHAT() */

#ifdef RELAXED_EPOCH
#define store_epoch store_relaxed
#else
#define store_epoch store_release
#endif
#define store_edge store_release

/* Steps that only the rank itself can see are one: its stores, until they leave, and its own words. */
inline look() {
  do
  :: true ->
     load(me, edge(at), value);
     atomic {
       load(me, what(at), whats[n]);  /* of the same wait, as is seen at the end */
       place[n] = at;
       epochs[n] = at_epoch;
       n++;
       if :: value == 0 || n > NP -> goto none :: else fi;
       at = value / 16;
       at_epoch = value % 16
     }
     atomic {
       load(me, epoch(at), value);
#ifdef NO_EPOCHS
       if :: value % 2 == 0 -> goto none :: else fi;
#else
       if :: value != at_epoch -> goto none :: else fi;
#endif
       if :: at == me -> break :: else fi
     }
  od;
#if !defined(NO_SECOND_LOOK) && !defined(NO_EPOCHS)
  i = 1;  /* its own cannot have ended */
  do
  :: atomic { i < n ->
       load(me, epoch(place[i]), value);
       if :: value != epochs[i] -> goto none :: else fi;
       i++
     }
  :: else -> break
  od;
#endif
  atomic {
    i = 0;
    do
    :: i < n ->
       at = (i + 1 < n -> place[i + 1] : me);
       assert(waits_for[place[i]] & (1 << at));
       assert(calls_in[at * GROUPS + waits_in[place[i]] / 16] < waits_in[place[i]] % 16);
       assert(whats[i] == waits_in[place[i]]);
       i++
    :: else -> break
    od;
    goto stopped
  }
}

proctype rank(byte me) {
  byte calls = 0, group = 0, sequence = 0, peer = 0, value = 0, mine = 0;
  byte n = 0, i = 0, at = 0, at_epoch = 0, place[NP + 1], epochs[NP + 1], whats[NP + 1];
  do
  :: atomic { calls < CALLS ->
       calls++;
       if :: group = 0 :: group = 1 fi;
       calls_in[me * GROUPS + group]++;
       sequence = calls_in[me * GROUPS + group];
       waits_in[me] = WHAT(group, sequence);
       do
       :: peer < NP ->
          if
#ifdef THREE
          :: peer != me && waits_for[me] == 0 -> waits_for[me] = 1 << peer
#else
          :: peer != me -> waits_for[me] = waits_for[me] | (1 << peer)
#endif
          :: true
          fi;
          peer++
       :: else -> peer = 0; break
       od;
       store_release(me, entered(me, group), sequence)
     };
     do
     :: waits_for[me] == 0 -> break
     :: atomic { waits_for[me] != 0 ->
          if
          :: waits_for[me] & 1 -> peer = 0
          :: waits_for[me] & 2 -> peer = 1
#if NP > 2
          :: waits_for[me] & 4 -> peer = 2
#endif
          fi;
          if
          :: load(me, entered(peer, group), value);
             if
             :: value >= sequence -> waits_for[me] = waits_for[me] & (255 - (1 << peer)); goto none
             :: else -> goto none
             fi
          :: true  /* a slow look */
          fi;
          if
          :: mine % 2 == 0 ->
             mine++;
             if :: mine > 1 -> store_edge(me, edge(me), 0) :: else fi;  /* is 0 at first */
             store_release(me, what(me), WHAT(group, sequence));
             store_epoch(me, epoch(me), mine)
          :: else
          fi
        };
#ifdef EDGE_FIRST
        load(me, entered(peer, group), at);
        load(me, epoch(peer), value);
#else
        load(me, epoch(peer), value);
        load(me, entered(peer, group), at);
#endif
        atomic {
          if
          :: value % 2 == 1 && at < sequence ->
             store_edge(me, edge(me), EDGE(peer, value));
             place[0] = me;
             epochs[0] = mine;
             whats[0] = WHAT(group, sequence);
             n = 1;
             at = peer;
             at_epoch = value;
             load(me, epoch(at), value);
#ifdef NO_EPOCHS
             if :: value % 2 == 0 -> goto none :: else fi
#else
             if :: value != at_epoch -> goto none :: else fi
#endif
          :: else -> store_edge(me, edge(me), 0); goto none
          fi
        };
        look();
none:
        atomic {
          peer = 0; value = 0; n = 0; i = 0; at = 0; at_epoch = 0;
          do
          :: i < NP + 1 -> place[i] = 0; epochs[i] = 0; whats[i] = 0; i++
          :: else -> i = 0; break
          od
        }
     od;
     atomic {
       group = 0;
       sequence = 0;
       waits_in[me] = 0
#ifndef ONE_EPOCH
       ;
       if
       :: mine % 2 == 1 -> mine++; store_epoch(me, epoch(me), mine)
       :: else
       fi
#endif
     }
  :: else -> break
  od;
stopped:
}

init {
  byte r = 0;
  atomic {
    do
    :: r < NP -> run rank(r); r++
    :: else -> break
    od
  }
}
