//! Two answers at once over one engine thread. The reader of the second one goes away.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::scope;

use lathe_engine::{Engine, Event, Request, RequestId};
use lathe_model::tokenizer::Tokenizer;
use lathe_session::{Catalogue, Environment, Need, Options, SamplingChoice};
use lathe_session::{SessionError, Silent, decoder, encode_raw, open};

type Job = (Request, Sender<String>);

/// Runs until no job can come any more. A reader that is gone cancels its request.
fn serve(engine: &mut Engine, words: &Tokenizer, jobs: Receiver<Job>) -> Result<(), SessionError> {
    let mut readers: HashMap<RequestId, Sender<String>> = HashMap::new();
    loop {
        let idle = engine.is_idle();
        let job = if idle { jobs.recv().ok() } else { jobs.try_recv().ok() };
        if let Some((request, reader)) = job {
            readers.insert(engine.add(request, Some(decoder(words)))?, reader);
        } else if idle {
            return Ok(());
        }
        for event in engine.step()? {
            let Event::Token { request, text, .. } = event else { continue };
            if readers[&request].send(text).is_err() {
                engine.cancel(request);
            }
        }
    }
}

/// Serves both, and shows that nothing of the second one is left.
pub(crate) fn main() -> Result<(), SessionError> {
    let catalogue = Catalogue { environment: &Environment::from_process(), reporter: &Silent };
    let opened = open(&catalogue, "tiny", &Default::default())?;
    let need = Need { context: 128, sequences: 2, rows_max: None };
    let (mut engine, model) = opened.prepare(&Options::default(), need)?.into_engine(true, 2)?;
    let choice = SamplingChoice { max_tokens: Some(60), ignore_eos: true, ..Default::default() };
    let (submit, jobs) = channel();
    let mut readers = Vec::new();
    for prompt in ["A fox", "The sea"] {
        let request = choice.request(encode_raw(&model, prompt)?, &model.generation);
        let (text, reader) = channel();
        submit.send((request, text)).expect("the engine's end");
        readers.push(reader);
    }
    drop(submit);
    drop(readers.pop()); // The second reader goes away.
    let tokenizer = model.tokenizer.as_ref().expect("tiny has a tokenizer");
    scope(|scope| {
        scope.spawn(|| serve(&mut engine, tokenizer, jobs));
        readers.iter().flatten().for_each(|text| print!("{text}"));
    });
    assert_eq!(engine.stats().blocks_used, 0);
    assert!((60..120).contains(&engine.stats().generated_tokens), "one ran to its end");
    Ok(())
}
