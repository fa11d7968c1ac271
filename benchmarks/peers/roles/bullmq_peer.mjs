// BullMQ. It has no journal, so one stands beside it in Postgres, with an outbox: each event is a
// transaction of its own, and a publisher, woken by NOTIFY, publishes each in one more.
import { createRequire } from 'node:module';
import { randomUUID } from 'node:crypto';
import * as tally from './tally.mjs';

const load = createRequire(`${process.env.PEER_NODE_FOLDER}/package.json`);
const { Queue, QueueEvents, Worker } = load('bullmq');
const { Redis } = load('ioredis');
const pg = load('pg');

const CONCURRENCY = 8;
const BULK = 1000;
const CHANNEL = 'peer_outbox';
const connection = {
  host: tally.REDIS_URL.hostname,
  port: Number(tally.REDIS_URL.port),
  password: tally.REDIS_URL.password,
  maxRetriesPerRequest: null,
};
const pool = () => new pg.Pool({ connectionString: tally.DATABASE_URL, max: CONCURRENCY + 2 });

async function transaction(postgres, body) {
  const client = await postgres.connect();
  try {
    await client.query('BEGIN');
    const result = await body(client);
    await client.query('COMMIT');
    return result;
  } catch (error) {
    await client.query('ROLLBACK').catch(() => {});
    throw error;
  } finally {
    client.release();
  }
}

async function install() {
  const postgres = pool();
  await postgres.query(`
    CREATE TABLE runs (id text PRIMARY KEY, state text NOT NULL DEFAULT 'started',
      started_at timestamptz DEFAULT now(), finished_at timestamptz, last_seq int NOT NULL DEFAULT 0);
    CREATE TABLE outbox (run_id text PRIMARY KEY REFERENCES runs ON DELETE CASCADE,
      next_seq int NOT NULL DEFAULT 1, updated_at timestamptz DEFAULT now());
    CREATE TABLE events (run_id text NOT NULL REFERENCES runs ON DELETE CASCADE, seq int NOT NULL,
      ts bigint NOT NULL, type text NOT NULL, name text, published_at timestamptz,
      PRIMARY KEY (run_id, seq));`);
  await postgres.end();
}

const SQL = {
  lastSeq: 'SELECT last_seq FROM runs WHERE id = $1',
  touch: 'UPDATE outbox SET updated_at = now() WHERE run_id = $1',
  event: 'INSERT INTO events (run_id, seq, ts, type, name) VALUES ($1, $2, $3, $4, $5)',
  advance: 'UPDATE runs SET last_seq = $2 WHERE id = $1',
  finish: "UPDATE runs SET last_seq = $2, state = 'finished', finished_at = now() WHERE id = $1",
  notify: 'SELECT pg_notify($1, $2)',
  next: 'SELECT next_seq FROM outbox WHERE run_id = $1',
  unpublished: 'SELECT ts, type, name, published_at FROM events WHERE run_id = $1 AND seq = $2',
  published: 'UPDATE events SET published_at = now() WHERE run_id = $1 AND seq = $2',
  moved: 'UPDATE outbox SET next_seq = $2, updated_at = now() WHERE run_id = $1',
};
const run = (client, name, ...values) => client.query({ name, text: SQL[name], values });

const append = (postgres, runId, seq, type, name) => transaction(postgres, async (client) => {
  const found = await run(client, 'lastSeq', runId);
  if (found.rows[0].last_seq + 1 !== seq) throw new Error('the seq is not the next one');
  await run(client, 'touch', runId);
  await run(client, 'event', runId, seq, Date.now(), type, name);
  await run(client, type === 'RunFinished' ? 'finish' : 'advance', runId, seq);
  await run(client, 'notify', CHANNEL, runId);
});

async function execute(postgres, runId) {
  let seq = 0;
  const tell = (type, name) => append(postgres, runId, ++seq, type, name);
  await tell('RunStarted');
  for (let number = 0; number < 5; number++) {
    await tell('StepStarted', `step-${number}`);
    if (number === 2) await tell('DebugTrace', 'trace');
    await tell('StepFinished', `step-${number}`);
  }
  await tell('RunFinished');
}

const publishNext = (postgres, redis, runId) => transaction(postgres, async (client) => {
  const outbox = (await run(client, 'next', runId)).rows[0];
  const event = (await run(client, 'unpublished', runId, outbox.next_seq)).rows[0];
  if (!event || event.published_at) return false;
  await redis.publish(CHANNEL, JSON.stringify({ runId, seq: outbox.next_seq, ...event }));
  await run(client, 'published', runId, outbox.next_seq);
  await run(client, 'moved', runId, outbox.next_seq + 1);
  return event.type;
});

async function publish() {
  const postgres = pool(), redis = new Redis(connection), pending = new Map();
  const listener = new pg.Client({ connectionString: tally.DATABASE_URL });
  await listener.connect();
  listener.on('notification', ({ payload: runId }) => {
    const drained = (pending.get(runId) ?? Promise.resolve()).then(async () => {
      for (let type; (type = await publishNext(postgres, redis, runId));)
        if (type === 'RunFinished') tally.mark();
    }).finally(() => { if (pending.get(runId) === drained) pending.delete(runId); });
    pending.set(runId, drained);
  });
  await listener.query(`LISTEN ${CHANNEL}`);
  tally.ready();
}

async function work() {
  const postgres = pool();
  const worker = new Worker('default', async (job) => {
    if (job.name === 'job') tally.mark(job.data.began);
    else if (job.name === 'run') await execute(postgres, job.data.runId);
    else for (let number = 0; number < job.data.count; number++) {
      await tally.pause(0.02);
      await job.updateProgress({ began: tally.now(), number });
    }
  }, { connection, concurrency: CONCURRENCY });
  await worker.waitUntilReady();
  tally.ready();
}

async function startRuns(queue, count) {
  const postgres = pool();
  for (let start = 0; start < count; start += BULK) {
    const ids = Array.from({ length: Math.min(BULK, count - start) }, () => randomUUID());
    await transaction(postgres, async (client) => {
      await client.query('INSERT INTO runs (id) SELECT unnest($1::text[])', [ids]);
      await client.query('INSERT INTO outbox (run_id) SELECT unnest($1::text[])', [ids]);
    });
    await queue.addBulk(ids.map((runId) => ({ name: 'run', data: { runId } })));
  }
}

async function produce(what, how, count) {
  const queue = new Queue('default', { connection });
  await queue.waitUntilReady();
  const began = tally.now();
  if (what === 'live') await queue.add('live', { count });
  else if (what === 'run') await startRuns(queue, count);
  else if (how === 'paced') {
    for (const pause of tally.pauses(count)) {
      await tally.pause(pause);
      await queue.add('job', { began: tally.now() });
    }
  } else if (how === 'single') {
    for (let number = 0; number < count; number++) await queue.add('job', { began: 0 });
  } else {
    for (let start = 0; start < count; start += BULK) {
      const size = Math.min(BULK, count - start);
      await queue.addBulk(Array.from({ length: size }, () => ({ name: 'job', data: { began: 0 } })));
    }
  }
  tally.report({ seconds: tally.now() - began });
}

async function follow() {
  const events = new QueueEvents('default', { connection });
  events.on('progress', ({ data }) => tally.mark(data.began));
  await events.waitUntilReady();
  tally.ready();
}

const [role, ...given] = process.argv.slice(2);
switch (role) {
  case 'install': await install(); process.exit(0);
  case 'work': await work(); break;
  case 'publish': await publish(); break;
  case 'produce': await produce(given[0], given[1], Number(given[2])); process.exit(0);
  case 'follow': await follow(); break;
}
