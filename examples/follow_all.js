// Follows all runs with the EventSource of the browser; TYPES is in follow.js. See docs/http.md.
function followAll(base, show, forget, types = TYPES) {
  const seqs = new Map(); // the last event of each run
  let source, timer, last = "", missed = false;
  function open() {
    source = new EventSource(`${base}/v1/stream?${new URLSearchParams(last ? { after: last } : {})}`);
    source.onopen = () => { if (missed) forget(); missed = false; };
    for (const type of types)
      source.addEventListener(type, ({ data, lastEventId }) => {
        const event = JSON.parse(data);
        last = lastEventId;
        if (event.seq <= (seqs.get(event.run_id) ?? 0)) return; // it has come before
        seqs.set(event.run_id, event.seq);
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
      timer = setTimeout(open, 2000);
    };
  }
  open();
  return () => { clearTimeout(timer); source.close(); };
}
