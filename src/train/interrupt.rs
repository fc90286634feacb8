//! Ctrl-C and SIGTERM: the first asks the run to finish its step, save and leave; a second ends the process at once.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::error::{Error, Result};

/// Exit code after a second signal: 128 + SIGINT, as shells count.
pub const KILLED: i32 = 130;

/// Installs the handlers and gives the flag that the first signal sets.
pub fn install() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // Order matters: the shutdown looks at the flag before this very signal sets it.
        flag::register_conditional_shutdown(signal, KILLED, stop.clone())
            .and_then(|_| flag::register(signal, stop.clone()))
            .map_err(|e| Error::Unavailable { what: "the handler of Ctrl-C".into(), why: e.to_string() })?;
    }
    Ok(stop)
}
