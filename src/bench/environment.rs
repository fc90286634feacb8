//! When, from which commit and under which clocks a row was measured.

/// Cells that begin a row of `bench/results/*.csv`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// Year-month-day.
    pub date: String,
    /// Of the environment variable `HALFBYTE_COMMIT`, "" if it is not set.
    pub commit: String,
    /// Version of the NVIDIA driver; "" on the CPU and where NVML does not tell.
    pub driver: String,
    /// The clocks at this moment, where NVML tells them.
    pub sm_mhz: Option<u32>,
    pub memory_mhz: Option<u32>,
}

/// The environment right now: asked behind the last sample, the clocks are still those of the work. `gpu` is the number of
/// the GPU that computes, None for the CPU.
pub fn environment(gpu: Option<usize>) -> Environment {
    let here = Environment {
        date: chrono::Local::now().format("%Y-%m-%d").to_string(),
        commit: std::env::var("HALFBYTE_COMMIT").unwrap_or_default(),
        ..Environment::default()
    };
    match gpu {
        #[cfg(feature = "cuda")]
        Some(ordinal) => {
            use crate::backend::cuda::device::Reading;
            let Reading { driver, sm_mhz, memory_mhz } = Reading::of(ordinal);
            Environment { driver: driver.unwrap_or_default(), sm_mhz, memory_mhz, ..here }
        }
        _ => here,
    }
}
