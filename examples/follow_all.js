// Follows all runs with the EventSource of the browser; TYPES is in follow.js. See docs/http.md.
const logAll = (status) => console.error(`runs are not followed: HTTP ${status}`);

function followAll(base, show, forget, { types = TYPES, refused = logAll } = {}) {
  const seqs = new Map(); // the last event of each run
  let source, timer, ended = false, last = "", missed = false;
  const url = () => `${base}/v1/stream?${new URLSearchParams(last ? { after: last } : {})}`;
  const stop = () => { ended = true; clearTimeout(timer); source.close(); };
  async function again() {
    // An EventSource tells no status: the same request does, and is broken off when it has.
    const asked = new AbortController();
    const headers = { Accept: "text/event-stream" };
    const answer = await fetch(url(), { headers, signal: asked.signal }).catch(() => undefined);
    asked.abort();
    if (ended) return;
    const status = answer?.status;
    if (status >= 400 && status < 500 && status !== 429) { // as 401: nobody is logged in any more
      stop();
      return refused(status);
    }
    open();
  }
  function open() {
    source = new EventSource(url());
    source.onopen = () => { if (missed) forget(); missed = false; };
    for (const type of types)
      source.addEventListener(type, ({ data, lastEventId }) => {
        const event = JSON.parse(data);
        last = lastEventId;
        if (event.seq <= (seqs.get(event.run_id) ?? 0)) return; // it has come before
        seqs.delete(event.run_id); // the run that is silent for the longest is the first one
        seqs.set(event.run_id, event.seq);
        if (seqs.size > 100_000) seqs.delete(seqs.keys().next().value);
        show(event);
      });
    source.addEventListener("reset", ({ lastEventId }) => {
      last = lastEventId;
      seqs.clear();
      forget();
    });
    source.onerror = () => {
      // It comes again by itself, but not after a refusal, as a 503 while your app is restarted.
      if (source.readyState !== EventSource.CLOSED) return;
      missed = !last; // nothing says where to go on
      timer = setTimeout(again, 2000);
    };
  }
  open();
  return stop;
}
