//! NVTX ranges without a library of NVIDIA's: the protocol by which a profiler attaches to a program.
//!
//! nsys and ncu name a library in NVTX_INJECTION64_PATH (or load one first). The program calls its
//! `InitializeInjectionNvtx2` with a function that hands out tables of slots, and the tool writes into them what it wants
//! called. Without a tool there is nothing to call.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::ptr::{null, null_mut};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

unsafe extern "C" {
    fn dlopen(file: *const c_char, mode: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, symbol: *const c_char) -> *mut c_void;
}
const RTLD_LAZY: c_int = 1;

type GetExportTable = extern "C" fn(c_uint) -> *const c_void;

/// Slots of each module, from module 1 (core) to 6; slot 0 of each is not used.
const SIZES: [usize; 7] = [0, 16, 9, 15, 7, 16, 7];
const CORE: usize = 1;
const RANGE_PUSH_A: usize = 9;
const RANGE_POP: usize = 11;

/// Where the tool writes its functions.
static SLOTS: [[AtomicPtr<c_void>; 16]; 7] = [const { [const { AtomicPtr::new(null_mut()) }; 16] }; 7];
/// Addresses of the slots, as the tool wants them; a zero ends each row.
static TABLES: OnceLock<[[usize; 17]; 7]> = OnceLock::new();

#[repr(C)]
struct Callbacks {
    size: usize,
    get_module_function_table: extern "C" fn(c_int, *mut *const usize, *mut c_uint) -> c_int,
}

#[repr(C)]
struct VersionInfo {
    size: usize,
    version: u32,
    reserved: u32,
    set_injection_version: extern "C" fn(u32),
}

static CALLBACKS: Callbacks =
    Callbacks { size: size_of::<Callbacks>(), get_module_function_table: module_function_table };
static VERSION: VersionInfo =
    VersionInfo { size: size_of::<VersionInfo>(), version: 3, reserved: 0, set_injection_version: ignore_version };

extern "C" fn ignore_version(_: u32) {}

extern "C" fn module_function_table(module: c_int, table: *mut *const usize, size: *mut c_uint) -> c_int {
    let Some(module) = usize::try_from(module).ok().filter(|m| (1..SIZES.len()).contains(m)) else { return 0 };
    let slots = |m: usize| -> [usize; 17] {
        std::array::from_fn(|i| if i == 0 || i >= SIZES[m] { 0 } else { (&raw const SLOTS[m][i]) as usize })
    };
    let tables = TABLES.get_or_init(|| std::array::from_fn(slots));
    // SAFETY: the tool passes places for its results, or null for what it does not want.
    unsafe {
        if !table.is_null() {
            *table = tables[module].as_ptr();
        }
        if !size.is_null() {
            *size = SIZES[module] as c_uint;
        }
    }
    1
}

extern "C" fn export_table(id: c_uint) -> *const c_void {
    match id {
        1 => (&raw const CALLBACKS).cast(),
        3 => (&raw const VERSION).cast(),
        _ => null(),
    }
}

/// The functions of a tool that is attached.
#[derive(Clone, Copy)]
struct Tool {
    push: extern "C" fn(*const c_char) -> c_int,
    pop: extern "C" fn() -> c_int,
}

fn attach() -> Option<Tool> {
    let name: &CStr = c"InitializeInjectionNvtx2";
    // SAFETY: looks a symbol up in what is loaded already.
    let mut entry = unsafe { dlsym(null_mut(), name.as_ptr()) };
    if entry.is_null() {
        let path = CString::new(std::env::var("NVTX_INJECTION64_PATH").ok().filter(|p| !p.is_empty())?).ok()?;
        // SAFETY: loads the library that the profiler has named for this, as every program with NVTX ranges does. It stays.
        let library = unsafe { dlopen(path.as_ptr(), RTLD_LAZY) };
        if library.is_null() {
            return None;
        }
        // SAFETY: `library` was loaded just now.
        entry = unsafe { dlsym(library, name.as_ptr()) };
    }
    if entry.is_null() {
        return None;
    }
    // SAFETY: the protocol gives the symbol this type.
    let initialize: extern "C" fn(GetExportTable) -> c_int = unsafe { std::mem::transmute(entry) };
    if initialize(export_table) == 0 {
        return None;
    }
    let slot = |i: usize| Some(SLOTS[CORE][i].load(Ordering::Acquire)).filter(|f| !f.is_null());
    let (push, pop) = (slot(RANGE_PUSH_A)?, slot(RANGE_POP)?);
    // SAFETY: the tool has put its functions of these types there.
    unsafe {
        Some(Tool {
            push: std::mem::transmute::<*mut c_void, extern "C" fn(*const c_char) -> c_int>(push),
            pop: std::mem::transmute::<*mut c_void, extern "C" fn() -> c_int>(pop),
        })
    }
}

fn tool() -> Option<Tool> {
    static TOOL: OnceLock<Option<Tool>> = OnceLock::new();
    *TOOL.get_or_init(attach)
}

/// Begins a range on this thread, if a profiler listens. Each range needs its [`pop`].
pub fn push(name: impl FnOnce() -> String) {
    if let Some(tool) = tool()
        && let Ok(name) = CString::new(name())
    {
        (tool.push)(name.as_ptr());
    }
}

/// Ends the range that was begun last.
pub fn pop() {
    if let Some(tool) = tool() {
        (tool.pop)();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_finds_a_slot_for_every_function_of_the_core() {
        let callbacks = export_table(1).cast::<Callbacks>();
        // SAFETY: table 1 is `CALLBACKS`.
        let get = unsafe { (*callbacks).get_module_function_table };
        let (mut table, mut size) = (null(), 0);
        assert_eq!(get(CORE as c_int, &mut table, &mut size), 1);
        assert_eq!(size, 16);
        // SAFETY: the table has `size` entries and a zero behind them.
        let entries = unsafe { std::slice::from_raw_parts(table, size as usize + 1) };
        assert_eq!((entries[0], entries[16]), (0, 0));
        assert_eq!(entries[RANGE_PUSH_A], (&raw const SLOTS[CORE][RANGE_PUSH_A]) as usize);
        assert!(entries[1..16].iter().all(|&e| e != 0));
        assert_eq!((get(0, &mut table, &mut size), get(7, &mut table, &mut size)), (0, 0));
        assert!(export_table(2).is_null() && !export_table(3).is_null());
    }

    #[test]
    fn without_a_tool_ranges_cost_nothing_and_name_nothing() {
        push(|| unreachable!("no tool is attached to the unit tests"));
        pop();
    }
}
