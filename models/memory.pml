/* Memory as the C++ model allows more of it than any machine we know: NV variables shared by NP
   processes, each of which has a buffer of stores that others do not see yet.

   A store enters its process's buffer; memory() lets any of them out, in any order but
     - stores of one process to one variable leave in order (coherence), and
     - a release leaves after all that its process stored before it.
   With -DTSO they leave in order, as on x86. A load sees its own process's newest store, else
   memory. A fence waits until the buffer is empty. A read-modify-write acts on memory at once;
   a releasing one after a fence. Loads are not moved: where an argument rests on a load staying
   in its place, the variant of a model moves it by hand. */

#define CAP 3
#define AT(p, i) ((p) * CAP + (i))
byte mem[NV];
byte n_stores[NP];
byte store_variable[NP * CAP];
byte store_value[NP * CAP];
bool store_releases[NP * CAP];
hidden byte memory_i;

#define put(p, v, x, releases)                    \
  atomic {                                        \
    n_stores[p] < CAP;                            \
    store_variable[AT(p, n_stores[p])] = v;       \
    store_value[AT(p, n_stores[p])] = x;          \
    store_releases[AT(p, n_stores[p])] = releases; \
    n_stores[p] = n_stores[p] + 1                 \
  }
#define store_relaxed(p, v, x) put(p, v, x, false)
#define store_release(p, v, x) put(p, v, x, true)

#define load(p, v, to)                                                                \
  atomic {                                                                            \
    to = mem[v];                                                                      \
    memory_i = 0;                                                                     \
    do                                                                                \
    :: memory_i < n_stores[p] ->                                                      \
       if                                                                             \
       :: store_variable[AT(p, memory_i)] == (v) -> to = store_value[AT(p, memory_i)] \
       :: else                                                                        \
       fi;                                                                            \
       memory_i++                                                                     \
    :: else -> break                                                                  \
    od;                                                                               \
    memory_i = 0                                                                      \
  }

#define fence(p) (n_stores[p] == 0)

#define PENDING(p, i, v) (n_stores[p] > i && store_variable[AT(p, i)] == (v))
#define NONE_PENDING(p, v) (!PENDING(p, 0, v) && !PENDING(p, 1, v) && !PENDING(p, 2, v))
#define fetch_add_relaxed(p, v, x, was) \
  atomic { NONE_PENDING(p, v); was = mem[v]; mem[v] = was + x }
#define compare_exchange_acq_rel(p, v, from, to, won) \
  atomic { fence(p); won = (mem[v] == (from)); if :: won -> mem[v] = to :: else fi }

#ifdef TSO
#define MAY_PASS(p, i, j) false
#else
#define MAY_PASS(p, i, j) (store_variable[AT(p, i)] != store_variable[AT(p, j)])
#endif
#define MAY_LEAVE_0(p) (n_stores[p] > 0)
#define MAY_LEAVE_1(p) (n_stores[p] > 1 && !store_releases[AT(p, 1)] && MAY_PASS(p, 1, 0))
#define MAY_LEAVE_2(p)                                                            \
  (n_stores[p] > 2 && !store_releases[AT(p, 2)] && MAY_PASS(p, 2, 0) && MAY_PASS(p, 2, 1))

inline leave(p, i) {
  d_step {
    mem[store_variable[AT(p, i)]] = store_value[AT(p, i)];
    memory_i = i;
    do
    :: memory_i + 1 < CAP ->
       store_variable[AT(p, memory_i)] = store_variable[AT(p, memory_i + 1)];
       store_value[AT(p, memory_i)] = store_value[AT(p, memory_i + 1)];
       store_releases[AT(p, memory_i)] = store_releases[AT(p, memory_i + 1)];
       memory_i++
    :: else -> break
    od;
    store_variable[AT(p, CAP - 1)] = 0;
    store_value[AT(p, CAP - 1)] = 0;
    store_releases[AT(p, CAP - 1)] = false;
    n_stores[p] = n_stores[p] - 1;
    memory_i = 0
  }
}

active proctype memory() {
end:
  do
  :: atomic { MAY_LEAVE_0(0) -> leave(0, 0) }
  :: atomic { MAY_LEAVE_1(0) -> leave(0, 1) }
  :: atomic { MAY_LEAVE_2(0) -> leave(0, 2) }
  :: atomic { MAY_LEAVE_0(1) -> leave(1, 0) }
  :: atomic { MAY_LEAVE_1(1) -> leave(1, 1) }
  :: atomic { MAY_LEAVE_2(1) -> leave(1, 2) }
#if NP > 2
  :: atomic { MAY_LEAVE_0(2) -> leave(2, 0) }
  :: atomic { MAY_LEAVE_1(2) -> leave(2, 1) }
  :: atomic { MAY_LEAVE_2(2) -> leave(2, 2) }
#endif
  od
}
