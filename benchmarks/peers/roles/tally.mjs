// Records of what a process of a peer has done, for the process that measures: as tally.py.
import fs from 'node:fs';

const FOLDER = process.env.PEER_TALLY;
export const DATABASE_URL = process.env.PEER_DATABASE_URL;
export const REDIS_URL = new URL(process.env.PEER_REDIS_URL);

// CLOCK_MONOTONIC in seconds, the clock of Python's time.monotonic().
export const now = () => Number(process.hrtime.bigint()) / 1e9;

const file = fs.openSync(`${FOLDER}/t.${process.pid}`, 'a');
const entry = Buffer.alloc(16);

export function mark(began = 0) {
  entry.writeDoubleLE(began, 0);
  entry.writeDoubleLE(now(), 8);
  fs.writeSync(file, entry);
}

export const ready = () => fs.writeFileSync(`${FOLDER}/ready.${process.pid}`, '');
export const report = (facts) => fs.writeFileSync(`${FOLDER}/report`, JSON.stringify(facts));
export const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, seconds * 1000));

// So many pauses of 50 ± 20 ms: no poll of a peer stays in step with it.
export function* pauses(count) {
  let seed = 7, due = now();
  for (let number = 0; number < count; number++) {
    seed = (seed * 16807) % 2147483647;
    due += 0.03 + 0.04 * (seed / 2147483647);
    yield Math.max(0, due - now());
  }
}
