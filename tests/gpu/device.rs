//! The device itself: discovery, moves, and checks that need no kernel to run.

use halfbyte::Error;
use halfbyte::backend::cuda::Cuda;
use halfbyte::backend::cuda::device::Driver;
use libtest_mimic::Trial;

use crate::support::{Outcome, same};

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("device/discovery_shows_the_gpu_that_opens", discovery),
        Trial::test("device/a_gpu_that_is_not_there_is_unavailable", not_there),
        Trial::test("device/moves_are_exact", moves),
        Trial::test("device/a_buffer_of_another_stream_is_refused", another_stream),
    ]
}

fn discovery() -> Outcome {
    let driver = Driver::discover()?;
    let cuda = Cuda::open(0)?;
    let device = cuda.device();
    let (free, total) = cuda.memory()?;
    println!("{device:?}, driver {:?}, {free} of {total} bytes free", driver.version);
    assert_eq!(driver.devices[0].name, device.name);
    assert!(free <= total && total <= device.memory, "{free} {total} {}", device.memory);
    assert!(device.compute_capability >= (8, 0) && device.multiprocessors > 0);
    Ok(())
}

fn not_there() -> Outcome {
    let error = Cuda::open(1000).err().ok_or("GPU 1000 opened")?;
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    Ok(())
}

fn moves() -> Outcome {
    let cuda = Cuda::open(0)?;
    for n in [0usize, 1, 7, 4096, 1_000_003] {
        let values: Vec<u32> = (0..n as u32).map(|i| i.wrapping_mul(0x9e37_79b9)).collect();
        let buffer = cuda.upload(&values)?;
        same("moved", &cuda.download(&buffer)?, &values)?;
        same("zeros", &cuda.download(&cuda.zeros::<u32>(n)?)?, &vec![0; n])?;
    }
    Ok(())
}

fn another_stream() -> Outcome {
    let (one, other) = (Cuda::open(0)?, Cuda::open(0)?);
    let error = other.download(&one.upload(&[1.0f32])?).err().ok_or("taken")?;
    assert!(matches!(error, Error::Cuda { .. }), "{error}");
    Ok(())
}
