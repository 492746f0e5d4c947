/* asked: a message leaves without its bytes only where its receive is posted already.
   csrc/cpu/asked.h: posted(), count(), asked(). One sender, a receiver that asks it and, now and then, any
   rank; another rank's messages may take what was asked of any. Messages and receives of one tag meet in
   order.

   holds
   refuted  -DFLAG        a word that says that a receive is posted, not how many were: a message before took it
   refuted  -DCOUNT_ANY   receives from any rank count: another rank's message took it */
#define MESSAGES 4
#define RECEIVES 4
byte told = 0;              /* the receiver's count, as the sender sees it; relaxed */
byte sent = 0;              /* messages that left, with their bytes or without */
byte met = 0;               /* of them, those that have their receive */
byte named = 0, any = 0;    /* receives posted that nothing has come for */
byte posted = 0;

/* What the receiver's lists say once all that was sent has met what is posted. */
#define UNMET (sent - met)

active proctype sender() {
  byte n = 0, seen;
  do
  :: n < MESSAGES ->
     n++;
     seen = told;
     if
#ifdef FLAG
     :: seen > 0 ->
#else
     :: seen >= n ->
#endif
        /* Offered: receives that nobody else can take are there for it and all before it. */
        atomic { sent++; assert(named >= UNMET) }
     :: true -> sent++  /* with its bytes */
     fi
  :: else -> break
  od
}

active proctype receiver() {
  byte total = 0;
  do
  :: posted < RECEIVES ->
     posted++;
     if
     :: named++; total++
     :: any++;
#ifdef COUNT_ANY
        total++
#endif
     fi;
     told = total
  :: atomic { UNMET > 0 && named > 0 -> named--; met++ }
  :: atomic { UNMET > 0 && any > 0 -> any--; met++ }
  :: atomic { any > 0 -> any-- }  /* another rank's message */
  :: posted == RECEIVES && (UNMET == 0 || named + any == 0) -> break
  od
}
