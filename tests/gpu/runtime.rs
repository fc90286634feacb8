//! What holds a step together: replay, copies beside the kernels, places in errors, what a step may not ask the driver for.

use half::bf16;
use halfbyte::Error;
use halfbyte::backend::cuda::Cuda;
use halfbyte::backend::cuda::memory::Buffer;
use halfbyte::backend::{Backend, Item, Needs, Scope, StepKey, StepKind, SwigluForward};
use libtest_mimic::Trial;

use crate::support::{Outcome, Random, same, wide};

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("runtime/a_replayed_step_reads_what_lies_in_memory_now", replay),
        Trial::test("runtime/replay_on_and_off_give_the_same_bits", on_and_off),
        Trial::test("runtime/more_keys_than_graphs_are_all_served", many_keys),
        Trial::test("runtime/what_is_sent_comes_back", send_and_fetch),
        Trial::test("runtime/copies_are_part_of_a_replayed_step", copies_in_a_step),
        Trial::test("runtime/an_error_names_its_place_in_the_step", place),
        Trial::test("runtime/a_failed_record_leaves_the_stream_usable", failed_record),
        Trial::test("runtime/a_step_neither_allocates_nor_waits", quiet),
        Trial::test("runtime/memory_is_counted_by_item", by_item),
        Trial::test("runtime/a_second_large_model_finds_the_memory_of_the_first_free", released),
        Trial::test("runtime/a_head_size_without_a_kernel_is_refused_at_set_up", head_size),
    ]
}

const T: usize = 64;
const F: usize = 96;

fn key(m: usize) -> StepKey {
    StepKey { model: 1, batch: 1, kind: StepKind::Train, t: T, b: 1, m, dropout: None }
}

struct Swiglu {
    gate_up: Buffer<bf16>,
    y: Buffer<bf16>,
}

impl Swiglu {
    fn new(cuda: &mut Cuda) -> Result<Self, Error> {
        Ok(Self { gate_up: cuda.alloc_act(T * 2 * F)?, y: cuda.alloc_act(T * F)? })
    }

    fn set(&mut self, cuda: &mut Cuda, seed: u64) -> Result<(), Error> {
        cuda.write_act(&mut self.gate_up, &wide(&Random::new(seed).bf16s(T * 2 * F, 1.0)))
    }

    fn launch(&mut self, cuda: &mut Cuda) -> Result<(), Error> {
        cuda.swiglu_forward(SwigluForward { y: &mut self.y, gate_up: &self.gate_up, t: T, f: F })
    }

    fn read(&self, cuda: &mut Cuda) -> Result<Vec<f32>, Error> {
        let mut out = vec![0.0; T * F];
        cuda.read_act(&self.y, &mut out)?;
        Ok(out)
    }

    /// The result for the input of `seed`, launched as it is.
    fn direct(cuda: &mut Cuda, seed: u64) -> Result<Vec<f32>, Error> {
        let mut fresh = Self::new(cuda)?;
        fresh.set(cuda, seed)?;
        fresh.launch(cuda)?;
        fresh.read(cuda)
    }
}

fn replay() -> Outcome {
    let mut cuda = Cuda::open(0)?;
    cuda.use_graphs(true);
    let mut step = Swiglu::new(&mut cuda)?;
    for seed in 0..5 {
        step.set(&mut cuda, seed)?;
        cuda.micro_step(key(0), 0, &mut |cuda| step.launch(cuda))?;
        let expected = Swiglu::direct(&mut cuda, seed)?;
        same(&format!("call {seed}"), &step.read(&mut cuda)?, &expected)?;
    }
    let calls = cuda.calls();
    assert_eq!((calls.records, calls.replays), (1, 4), "the second call records");
    Ok(())
}

fn on_and_off() -> Outcome {
    let mut results = vec![];
    for on in [true, false] {
        let mut cuda = Cuda::open(0)?;
        cuda.use_graphs(on);
        let mut step = Swiglu::new(&mut cuda)?;
        step.set(&mut cuda, 3)?;
        for _ in 0..3 {
            cuda.micro_step(key(0), 0, &mut |cuda| step.launch(cuda))?;
        }
        assert_eq!(cuda.calls().replays > 0, on);
        results.push(step.read(&mut cuda)?);
    }
    same("y", &results[0], &results[1])
}

fn many_keys() -> Outcome {
    let mut cuda = Cuda::open(0)?;
    cuda.use_graphs(true);
    let mut step = Swiglu::new(&mut cuda)?;
    for round in 0..3u64 {
        for m in 0..20 {
            let seed = round * 100 + m as u64;
            step.set(&mut cuda, seed)?;
            cuda.micro_step(key(m), 0, &mut |cuda| step.launch(cuda))?;
            let expected = Swiglu::direct(&mut cuda, seed)?;
            same(&format!("key {m} in round {round}"), &step.read(&mut cuda)?, &expected)?;
        }
    }
    Ok(())
}

fn send_and_fetch() -> Outcome {
    let mut cuda = Cuda::open(0)?;
    let values = wide(&Random::new(1).bf16s(10_000, 1.0));
    let (mut from, mut to) = (cuda.alloc_act(10_000)?, cuda.alloc_act(10_000)?);
    let mut host = cuda.alloc_host(10_000)?;
    cuda.write_act(&mut from, &values)?;
    // More copies than there are events.
    for len in (1..=700).map(|i| 10 * i) {
        let sent = cuda.send(&mut host, &from, len)?;
        cuda.wait(sent)?;
        let fetched = cuda.fetch(&mut to, &host, len)?;
        cuda.wait(fetched)?;
    }
    let mut found = vec![0.0; 10_000];
    cuda.read_act(&to, &mut found)?;
    same("what came back", &found[..7000], &values[..7000])?;
    same("what was not asked for", &found[7000..], &vec![0.0; 3000])?;
    let error = cuda.send(&mut host, &from, 10_001).err().ok_or("more than there is was sent")?;
    assert!(matches!(error, Error::Shape { op: "send", .. }), "{error}");
    Ok(())
}

/// y of the input is sent away, overwritten, and fetched again, inside one step.
fn copies_in_a_step() -> Outcome {
    let mut cuda = Cuda::open(0)?;
    cuda.use_graphs(true);
    let mut step = Swiglu::new(&mut cuda)?;
    let mut host = cuda.alloc_host(T * F)?;
    for seed in 0..5 {
        step.set(&mut cuda, seed)?;
        cuda.micro_step(key(0), 0, &mut |cuda| {
            step.launch(cuda)?;
            let sent = cuda.send(&mut host, &step.y, T * F)?;
            cuda.wait(sent)?;
            cuda.zero_act(&mut step.y)?;
            let fetched = cuda.fetch(&mut step.y, &host, T * F)?;
            cuda.wait(fetched)
        })?;
        let expected = Swiglu::direct(&mut cuda, seed)?;
        same(&format!("call {seed}"), &step.read(&mut cuda)?, &expected)?;
    }
    assert_eq!(cuda.calls().records, 1);
    Ok(())
}

fn place() -> Outcome {
    let mut cuda = Cuda::open(0)?;
    let other = Cuda::open(0)?;
    let mut step = Swiglu::new(&mut cuda)?;
    // A buffer of another stream is refused as an error of the GPU.
    step.gate_up = other.zeros(T * 2 * F)?;
    let failed = cuda.micro_step(key(0), 0, &mut |cuda| {
        cuda.enter(Scope::Backward);
        cuda.enter(Scope::Layer(12));
        step.launch(cuda)?;
        cuda.leave();
        cuda.leave();
        Ok(())
    });
    let text = failed.err().ok_or("a buffer of another stream was taken")?.to_string();
    assert!(text.contains("(backward, layer 12)"), "{text}");
    assert_eq!(text.matches("layer 12").count(), 1, "{text}");
    let error = cuda.read_f32(&other.zeros(1)?, &mut [0.0]).err().ok_or("taken")?.to_string();
    assert!(!error.contains("layer"), "the error before has left its scopes: {error}");
    Ok(())
}

fn failed_record() -> Outcome {
    let mut cuda = Cuda::open(0)?;
    cuda.use_graphs(true);
    let mut step = Swiglu::new(&mut cuda)?;
    let mut fail = false;
    for _ in 0..2 {
        let result = cuda.micro_step(key(0), 0, &mut |cuda| {
            step.launch(cuda)?;
            if fail { Err(Error::flag("test", "a", "b")) } else { Ok(()) }
        });
        assert_eq!(result.is_err(), fail);
        fail = true;
    }
    step.set(&mut cuda, 9)?;
    cuda.micro_step(key(0), 0, &mut |cuda| step.launch(cuda))?;
    let expected = Swiglu::direct(&mut cuda, 9)?;
    same("y behind the failure", &step.read(&mut cuda)?, &expected)
}

fn quiet() -> Outcome {
    let mut cuda = Cuda::open(0)?;
    cuda.use_graphs(true);
    let mut step = Swiglu::new(&mut cuda)?;
    let before = cuda.calls();
    for _ in 0..4 {
        cuda.micro_step(key(0), 0, &mut |cuda| step.launch(cuda))?;
    }
    let after = cuda.calls();
    assert_eq!((after.allocations, after.waits), (before.allocations, before.waits));
    step.read(&mut cuda)?;
    assert_eq!(cuda.calls().waits, before.waits + 1, "reading waits");
    Ok(())
}

fn by_item() -> Outcome {
    let mut cuda = Cuda::open(0)?;
    Backend::reserve(&mut cuda, 1 << 20)?;
    cuda.label(Item::Scratch);
    let _kept = (cuda.alloc_act(100)?, cuda.alloc_f32(1000)?);
    cuda.label(Item::Batch);
    let _also = cuda.alloc_i32(64)?;
    let used = cuda.memory_by_item();
    assert_eq!((used[&Item::Scratch], used[&Item::Batch]), (256 + 4096, 256));
    assert_eq!(cuda.arena_use(), Some((256 + 4096 + 256, 1 << 20)));
    Ok(())
}

fn released() -> Outcome {
    const RESERVED: usize = 4 << 30;
    // Modules and cuBLAS's own memory.
    const SLACK: usize = 1 << 30;
    let mut cuda = Cuda::open(0)?;
    let needs = Needs { t: 64, c: 64, n: 128, v: 256, ..Needs::default() };
    let start = cuda.memory()?.0;
    for _ in 0..2 {
        Backend::reserve(&mut cuda, RESERVED)?;
        cuda.prepare(&needs)?;
        let buffer = cuda.alloc_act(1000)?;
        let taken = start.saturating_sub(cuda.memory()?.0);
        assert!((RESERVED..RESERVED + SLACK).contains(&taken), "{taken} bytes are taken");
        drop(buffer);
    }
    Backend::release(&mut cuda)?;
    let kept = start.saturating_sub(cuda.memory()?.0);
    assert!(kept < SLACK, "{kept} bytes are still held");
    assert_eq!(cuda.arena_use(), None);
    Ok(())
}

fn head_size() -> Outcome {
    let mut cuda = Cuda::open(0)?;
    for d in [8, 20, 264] {
        let heads = Some(halfbyte::backend::Heads { h: 1, g: 1, d, window: None });
        let error = cuda.prepare(&Needs { t: 1, c: 8, v: 8, heads, ..Needs::default() }).err().ok_or("taken")?;
        assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    }
    Ok(())
}
