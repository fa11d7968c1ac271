// Follows one run with the EventSource of the browser; explained in docs/http.md.
const TYPES = ["RunStarted", "StepStarted", "StepFinished", "StepFailed", "DebugTrace",
  "StepOutput", "CancelRequested", "WaitStarted", "SignalReceived", "WaitFinished",
  "ChildrenStarted", "ChildrenFinished", "RunRestarted", "UndoStarted", "InputReplaced",
  "RunFinished"];

const log = (run, status) => console.error(`run ${run} is not followed: HTTP ${status}`);

function follow(base, run, show, forget, { cookies = false, tokenUrl = "", refused = log } = {}) {
  let source, ended = false, last = "";
  const stop = () => { ended = true; source?.close(); };
  const again = () => setTimeout(() => ended || open().catch(again), 2000);
  async function open() {
    // Where your session cookie authenticates (`authenticate`, below), no token is needed. Else it is
    // one of the API, or of `tokenUrl`: a path of your own, for those whom the API does not know.
    const made = await (tokenUrl ? fetch(tokenUrl) : cookies ? fetch(`${base}/v1/runs/${run}`)
      : fetch(`${base}/v1/runs/${run}/stream-token`, { method: "POST" }));
    if (made.status >= 400 && made.status < 500) { // no such run (yet: commit first), or not yours
      stop();
      return refused(run, made.status);
    }
    const query = new URLSearchParams(cookies && !tokenUrl ? {} : { token: (await made.json()).token });
    if (ended) return;
    if (last) query.set("from_seq", last);
    source = new EventSource(`${base}/v1/runs/${run}/stream?${query}`);
    for (const type of TYPES)
      source.addEventListener(type, (message) => {
        last = message.lastEventId;
        if (type === "RunFinished") stop();
        show(JSON.parse(message.data));
      });
    source.addEventListener("reset", (message) => { last = message.lastEventId; forget(); });
    source.onerror = () => {
      // It comes again by itself, but not after a refusal, as of a token that has ended (401).
      if (source.readyState === EventSource.CLOSED) again();
    };
  }
  open().catch(again);
  return stop;
}
