#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| halfbyte_fuzz::model_config(bytes));
